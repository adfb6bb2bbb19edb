"""Requests that are refused before they are queued, each in OpenAI's error shape."""

import json
import time

import pytest
from starlette.testclient import TestClient

from cat_fast.errors import UserError
from cat_fast.inference.server.app import create_app
from cat_fast.inference.server.settings import MAX_RECONSTRUCTIONS, ServerSettings
from tests.inference.engine.mixes import tiny_pipeline
from tests.inference.server.conftest import BODY, TOKEN, make_service, png

GENERATIONS = "/v1/images/generations"
CODES = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}


def check(reply, status, code, param=None):
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["type"] == CODES.get(status, "invalid_request_error")
    assert error["message"]
    assert reply.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"prompt": 7}, 400, "invalid_value", "prompt"),
        ({"prompt": None}, 400, "invalid_value", "prompt"),
        ({"prompt": ""}, 400, "invalid_value", "prompt"),
        ({"prompt": "  \n"}, 400, "invalid_value", "prompt"),
        ({"prompt": "x" * 4097}, 400, "invalid_value", "prompt"),
        ({"n": 0}, 400, "invalid_value", "n"),
        ({"n": 11}, 400, "invalid_value", "n"),
        ({"n": True}, 400, "invalid_value", "n"),
        ({"n": 2.5}, 400, "invalid_value", "n"),
        ({"size": "64x72"}, 400, "invalid_size", "size"),
        ({"size": "256x64"}, 400, "invalid_size", "size"),
        ({"size": "large"}, 400, "invalid_value", "size"),
        ({"size": "0x64"}, 400, "invalid_value", "size"),
        ({"ratio": 16, "tokens": 4}, 400, "invalid_value", "tokens"),
        ({"ratio": 16, "mean_tokens": 4.0}, 400, "invalid_value", "mean_tokens"),
        ({"tokens": 16, "mean_tokens": 4.0}, 400, "invalid_value", "mean_tokens"),
        ({"ratio": 4}, 400, "invalid_value", "ratio"),
        ({"ratio": True}, 400, "invalid_value", "ratio"),
        ({"tokens": 0}, 400, "invalid_value", "tokens"),
        ({"size": "128x128", "tokens": 3}, 400, "invalid_value", "tokens"),
        ({"mean_tokens": 0.5}, 400, "invalid_value", "mean_tokens"),
        ({"num_inference_steps": 0}, 400, "invalid_value", "num_inference_steps"),
        ({"num_inference_steps": 1001}, 400, "invalid_value", "num_inference_steps"),
        ({"num_inference_steps": 1000, "scheduler": "dpm++"}, 400, "invalid_value", "num_inference_steps"),
        ({"scheduler": "euler"}, 400, "invalid_value", "scheduler"),
        ({"scheduler": "heun"}, 400, "invalid_value", "scheduler"),
        ({"guidance_scale": float("nan")}, 400, "invalid_value", "guidance_scale"),
        ({"guidance_scale": float("inf")}, 400, "invalid_value", "guidance_scale"),
        ({"guidance_scale": "high"}, 400, "invalid_value", "guidance_scale"),
        ({"seed": -1}, 400, "invalid_value", "seed"),
        ({"seed": 2**64}, 400, "invalid_value", "seed"),
        ({"seed": 2**64 - 1, "n": 2}, 400, "invalid_value", "seed"),
        ({"colour": "red"}, 400, "unknown_parameter", "colour"),
        ({"user": "x" * 257}, 400, "invalid_value", "user"),
        ({"response_format": "url"}, 400, "invalid_value", "response_format"),
        ({"model": "another"}, 404, "model_not_found", "model"),
        ({"deadline_seconds": 0}, 400, "invalid_value", "deadline_seconds"),
    ],
)
def test_generations(client, service, change, status, code, param):
    before = service.engine.statistics.submitted
    body = json.dumps({**BODY, **change})
    check(
        client.post(GENERATIONS, content=body, headers={"content-type": "application/json"}),
        status,
        code,
        param,
    )
    assert service.engine.statistics.submitted == before


def test_a_missing_prompt_and_a_body_that_is_not_json(client):
    check(client.post(GENERATIONS, json={"n": 1}), 400, "invalid_value", "prompt")
    headers = {"content-type": "application/json"}
    check(client.post(GENERATIONS, content=b"{", headers=headers), 400, "invalid_json")
    check(client.post(GENERATIONS, content=b"\xff\xfe", headers=headers), 400, "invalid_json")
    check(client.post(GENERATIONS, json=[1]), 400, "invalid_value")
    check(client.get(GENERATIONS), 405, "method_not_allowed")
    check(client.get("/v1/nothing"), 404, "not_found")


def test_a_prompt_that_is_no_class_of_a_class_conditional_pipeline():
    service = make_service(tiny_pipeline())
    try:
        client = TestClient(create_app(service))
        error = check(client.post(GENERATIONS, json=BODY), 400, "unknown_class", "prompt")
        assert "the closest are ['0', '1', '2']" in error["message"]
        assert client.post(GENERATIONS, json=BODY | {"prompt": "1"}).status_code == 200
    finally:
        service.drain()


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"GIF is not here", 415, "not_an_image"),
        (b"", 415, "not_an_image"),
        (png()[:2000], 400, "invalid_image"),
        (png(format="JPEG")[:2000], 400, "invalid_image"),
        (b"%PDF-1.4", 415, "not_an_image"),
    ],
)
def test_images(client, data, status, code):
    check(client.post("/v1/images/reconstructions", files={"image": ("x.png", data)}), status, code, "image")


def test_an_image_with_too_many_pixels_is_refused_by_its_header(client, monkeypatch):
    data = png()
    monkeypatch.setattr("cat_fast.inference.server.images.MAX_IMAGE_PIXELS", 4000)
    monkeypatch.setattr("PIL.Image.Image.load", lambda *_: pytest.fail("decoded"))
    error = check(
        client.post("/v1/images/reconstructions", files={"image": ("x.png", data)}),
        400,
        "invalid_image",
        "image",
    )
    assert "80 x 60 pixels is more than" in error["message"]


def test_more_uploads_at_once_than_the_limit(client, service, monkeypatch):
    upload = {"files": {"image": ("x.png", png())}}
    monkeypatch.setattr(service, "reconstructing", MAX_RECONSTRUCTIONS)
    reply = client.post("/v1/images/reconstructions", **upload)
    check(reply, 429, "queue_full")
    assert reply.headers["retry-after"] == "1"
    service.reconstructing -= 1
    assert client.post("/v1/images/reconstructions", **upload).status_code == 200
    check(
        client.post("/v1/images/reconstructions", files={"image": ("x", b"")}), 415, "not_an_image", "image"
    )
    assert service.reconstructing == MAX_RECONSTRUCTIONS - 1


def test_a_missing_image(client):
    check(client.post("/v1/images/reconstructions", data={}), 400, "invalid_value", "image")


def test_a_body_too_large_is_refused_before_it_is_read(client):
    def body():
        pytest.fail("the body was read")
        yield b""

    headers = {"content-length": "20000001", "content-type": "application/json"}
    check(client.post(GENERATIONS, content=body(), headers=headers), 413, "body_too_large")


def test_a_body_of_unknown_length_is_cut_off(client):
    chunks = (b"x" * 1_000_000 for _ in range(25))
    check(client.post(GENERATIONS, content=chunks), 413, "body_too_large")


def test_a_token_is_required_and_compared(text_pipeline):
    service = make_service(text_pipeline, token=TOKEN)
    try:
        client = TestClient(create_app(service))
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}):
            reply = client.post(GENERATIONS, json=BODY, headers=headers)
            check(reply, 401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
        right = {"authorization": f"Bearer {TOKEN}"}
        assert client.post(GENERATIONS, json=BODY, headers=right).status_code == 200
        for path in ("/", "/healthz", "/readyz", "/metrics"):
            assert client.get(path).status_code == 200
    finally:
        service.drain()


def test_a_full_queue_a_deadline_a_rate_and_a_drain(text_pipeline):
    service = make_service(text_pipeline, max_queue=1, requests_per_minute=6)
    client = TestClient(create_app(service))
    slow = BODY | {"num_inference_steps": 1000, "scheduler": "ddpm", "ratio": 8}
    reply = client.post(GENERATIONS, json=slow | {"n": 2})
    check(reply, 429, "queue_full")
    assert int(reply.headers["retry-after"]) >= 1
    while service.engine.unfinished:  # the first of the two is cancelled
        time.sleep(0.01)
    error = check(
        client.post(GENERATIONS, json=slow | {"deadline_seconds": 1e-3}), 422, "deadline_unreachable",
        "deadline_seconds",
    )  # fmt: skip
    assert error["earliest_seconds"] > 1e-3
    replies = (client.post("/v1/complexity", json={"description": "a cat"}) for _ in range(100))
    reply = next(reply for reply in replies if reply.status_code != 200)
    check(reply, 429, "rate_limit_exceeded")
    assert int(reply.headers["retry-after"]) >= 1
    service.settings.__dict__["requests_per_minute"] = 0
    service.drain()
    check(client.post(GENERATIONS, json=BODY), 503, "draining")
    check(client.post("/v1/complexity", json={"description": "a cat"}), 503, "draining")
    check(client.post("/v1/images/reconstructions", files={"image": ("x.png", png())}), 503, "draining")
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200


def test_a_server_that_is_not_ready(text_pipeline):
    from cat_fast.inference.server.service import Service

    service = Service(text_pipeline, ServerSettings(name="tiny", max_tokens=64))
    client = TestClient(create_app(service))
    reply = client.post(GENERATIONS, json=BODY)
    check(reply, 503, "not_ready")
    assert client.get("/readyz").json()["state"] == "starting"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "can be reached from other machines: give --token-file, or --insecure"),
        ({"host": "::"}, "can be reached from other machines"),
        ({"port": 70000}, "port 70000"),
        ({"token": "short"}, "shorter than 8 characters"),
        ({"token": "pässwörter"}, "characters that a header cannot carry"),
        ({"token": "two lines\nof text"}, "characters that a header cannot carry"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(UserError, match=message):
        ServerSettings(name="tiny", **settings)
    if "host" in settings:
        ServerSettings(name="tiny", insecure=True, **settings)
        ServerSettings(name="tiny", token=TOKEN, **settings)
