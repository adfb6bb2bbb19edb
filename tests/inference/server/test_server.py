"""Replies of the server: images, previews, reconstructions, complexity, metrics."""

import asyncio
import base64
import contextlib
import io
import json
import math
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from cat_fast.complexity.scorers.accurate.scorer import AccurateScorer
from cat_fast.errors import UserError
from cat_fast.inference.engine import EngineRequest
from cat_fast.inference.engine.decoding import Decoding
from cat_fast.inference.server import generation
from cat_fast.inference.server.app import _steps, create_app
from cat_fast.inference.server.errors import ApiError
from cat_fast.inference.server.schemas import GenerationBody
from cat_fast.inference.server.service import Service
from cat_fast.inference.server.settings import GENERATIONS, RECONSTRUCTIONS, ServerSettings
from tests.fake_compiler import compile_to
from tests.inference.engine.mixes import tiny_pipeline
from tests.inference.server.conftest import BODY, TOKEN, listening, make_service, png


def image_of(entry):
    return Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))


def events_of(reply):
    lines = [line for line in reply.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_images_are_those_of_the_pipeline_bit_for_bit(client, text_pipeline):
    reply = client.post(
        GENERATIONS, json=BODY | {"n": 3, "size": "64x128", "scheduler": "ddpm", "model": "tiny"}
    )
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert (body["size"], body["output_format"], len(body["data"])) == ("64x128", "png", 3)
    requests = text_pipeline.plan(["a red house"] * 3, seed=5, width=64, height=128)
    drawn = text_pipeline.draw(requests, num_inference_steps=3, scheduler="ddpm")
    for entry, image in zip(body["data"], drawn, strict=True):
        assert np.array_equal(np.asarray(image_of(entry)), np.asarray(image))
    metrics = body["metrics"]
    assert [one["seed"] for one in metrics["images"]] == [5, 6, 7]
    assert metrics["tokens"] == sum(request.num_tokens for request in requests)
    assert metrics["flops"] > 0
    assert metrics["prompt_truncated"] is False
    assert all(one["seconds_denoising"] > 0 for one in metrics["images"])


def test_steps_and_guidance_default_to_those_of_the_pipeline(service):
    (request,) = generation.plan(service, GenerationBody(prompt="a red house")).requests
    assert request.num_inference_steps == service.pipeline.default_steps
    assert request.guidance_scale == service.pipeline.default_guidance


def test_a_flow_is_drawn_with_euler_steps_by_default(encoder):
    pipeline = tiny_pipeline(encoder, prediction="flow")
    service = make_service(pipeline)
    client = TestClient(create_app(service))
    assert service.default_scheduler == "euler"
    reply = client.post(GENERATIONS, json=BODY)
    assert reply.status_code == 200, reply.text
    requests = pipeline.plan(["a red house"], seed=5)
    (drawn,) = pipeline.draw(requests, num_inference_steps=3, scheduler="euler")
    assert np.array_equal(np.asarray(image_of(reply.json()["data"][0])), np.asarray(drawn))
    refused = client.post(GENERATIONS, json=BODY | {"scheduler": "ddim"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "scheduler")
    assert client.get("/").status_code == 200
    service.drain()


def test_a_prompt_is_scored_once_for_ratio_and_queue(service, monkeypatch):
    scored = []
    score_many = AccurateScorer.score_many
    monkeypatch.setattr(
        AccurateScorer, "score_many", lambda self, given: scored.extend(given) or score_many(self, given)
    )
    planned = generation.plan(service, GenerationBody(prompt="a red house", n=3))
    assert len(planned.requests) == 3
    assert [description.caption for description in scored] == ["a red house"]


def test_ratio_and_tokens(client):
    for change, ratio in (
        ({"ratio": 8}, 8),
        ({"tokens": 15}, 16),
        ({"tokens": 2}, 32),
        ({"mean_tokens": 4.0}, 16),
    ):
        reply = client.post(GENERATIONS, json=BODY | change).json()
        assert reply["metrics"]["images"][0]["ratio"] == ratio


def test_an_image_that_exceeds_the_tokens_of_a_step_is_refused(text_pipeline):
    service = make_service(text_pipeline, prepared=False, max_tokens=64)
    message = "has 64 tokens, 128 with .* at least 128, or choose a smaller size or a coarser ratio"
    with pytest.raises(ApiError, match=message) as caught:
        generation.plan(service, GenerationBody(prompt="a red house", size="128x128", ratio=8))
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_size", "size")


def test_a_long_prompt_is_cut_and_the_reply_states_it(client):
    metrics = client.post(GENERATIONS, json=BODY | {"prompt": "a red house " * 50}).json()["metrics"]
    assert (metrics["prompt_tokens"], metrics["prompt_tokens_used"]) == (150, 16)
    assert metrics["prompt_truncated"] is True


def test_a_stream_of_previews(client):
    reply = client.post(GENERATIONS, json=BODY | {"stream": True, "num_inference_steps": 8, "n": 2})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = events_of(reply)
    kinds = [event["type"].removeprefix("image_generation.") for event in events]
    assert kinds[:2] == ["queued"] * 2
    assert kinds.count("completed") == 2
    assert kinds[-1] == "metrics"
    assert "partial_image" in kinds
    whole = client.post(GENERATIONS, json=BODY | {"num_inference_steps": 8, "n": 2}).json()
    done = {
        event["image_index"]: event["b64_json"] for event in events if event["type"].endswith("completed")
    }
    assert [done[0], done[1]] == [entry["b64_json"] for entry in whole["data"]]
    previews = [image_of(event) for event in events if event["type"].endswith("partial_image")]
    assert all(preview.size == (64, 64) for preview in previews)


@pytest.mark.parametrize(("steps", "wanted"), [(8, 3), (7, 2), (19, 10), (30, 8), (3, 10), (5, 0)])
def test_a_stream_has_at_most_as_many_previews_as_wanted(client, monkeypatch, steps, wanted):
    monkeypatch.setattr(Decoding, "preview", lambda self, handle, *_: seen.append(handle.record.steps_done))
    seen = []
    body = BODY | {"stream": True, "num_inference_steps": steps, "partial_images": wanted}
    assert events_of(client.post(GENERATIONS, json=body))[-1]["type"].endswith("metrics")
    assert len(seen) <= wanted
    assert (len(seen) > 0) == (wanted > 0)


def test_a_stream_is_queued_next_to_the_event_loop(client, monkeypatch):
    """A forecast with a long queue takes longer than /healthz may wait."""
    loops, submit = [], generation.submit

    def recorded(*arguments):
        with contextlib.suppress(RuntimeError):
            loops.append(asyncio.get_running_loop())
        return submit(*arguments)

    monkeypatch.setattr(generation, "submit", recorded)
    for stream in (True, False):
        assert client.post(GENERATIONS, json=BODY | {"stream": stream}).status_code == 200
    assert loops == []


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_after_images_were_queued_is_not_a_refusal(service, monkeypatch, stream):
    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(generation, "event" if stream else "metrics", broken)
    submitted, refusals = service.engine.statistics.submitted, dict(service.refusals)
    client = TestClient(create_app(service), raise_server_exceptions=False)
    assert client.post(GENERATIONS, json=BODY | {"stream": stream}).status_code == 500
    assert service.engine.statistics.submitted == submitted + 1
    assert dict(service.refusals) == refusals


@pytest.mark.parametrize(("error", "status"), [(UserError("no scorer"), 400), (RuntimeError("broken"), 500)])
def test_an_unhandled_error_is_answered_with_the_status_and_the_id_of_its_log(
    service, monkeypatch, capfd, error, status
):
    def broken(*_):
        raise error

    monkeypatch.setattr(generation, "require_scores", broken)
    client = TestClient(create_app(service), raise_server_exceptions=False)
    reply = client.post(GENERATIONS, json=BODY, headers={"x-request-id": "abc-3"})
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines if line["request_id"] == "abc-3"] == [status]
    assert (reply.status_code, reply.headers["x-request-id"]) == (status, "abc-3")
    assert str(error) in reply.json()["error"]["message"]


def test_steps_are_shown_until_the_engine_is_idle(client, service):
    client.post(GENERATIONS, json=BODY)

    class Connected:
        async def is_disconnected(self):
            return False

    async def first():
        return await anext(_steps(service, Connected()))

    shown = json.loads(asyncio.run(first()).split("data: ")[1])
    assert shown["running"] is False
    assert shown["requests"][0]["steps"] == 3


def test_reconstructions(client):
    files = {"image": ("x.png", png((200, 100)), "image/png")}
    found = client.post(RECONSTRUCTIONS, files=files).json()
    assert [one["ratio"] for one in found["reconstructions"]] == [8, 16, 32]
    assert [one["tokens"] for one in found["reconstructions"]] == [16, 4, 1]
    assert all(image_of(one).size == (64, 64) for one in found["reconstructions"])
    assert found["description"] is None
    assert found["reasons"].startswith("compared with an average image: ")
    assert "lowered by textures and parts" in found["reasons"]
    assert 1 <= found["score"] <= 9
    assert found["ratio"] in (8, 16, 32)
    page = {"description": "a newspaper page with columns of text, tables and many photographs"}
    found = client.post(RECONSTRUCTIONS, files=files, data=page).json()
    assert (found["ratio"], found["tokens"]) == (8, 16)
    assert found["score"] >= 7
    assert found["reasons"] == "no single word changes it", "at the upper end of the scale"
    page = {"description": "a crowded street market with hundreds of people, signs and goods"}
    found = client.post(RECONSTRUCTIONS, files=files, data=page).json()
    assert 'raised by word "' in found["reasons"], "the scorer gives no reasons: the effects of words do"
    assert found["saved_tokens"] == pytest.approx(1 - 16 / 4)


def test_complexity(client):
    simple, complex_ = (
        client.post("/v1/complexity", json={"description": text}).json()
        for text in ("a clear blue sky", "a crowded street market with hundreds of people, signs and goods")
    )
    assert simple["score"] < complex_["score"]
    assert simple["ratio"] >= complex_["ratio"]
    assert 0 <= simple["confidence"] <= 1


def test_metrics_and_readiness(client, service):
    client.post(GENERATIONS, json=BODY)
    text = client.get("/metrics").text
    values = dict(re.findall(r"^(cat_fast_\S+) (\S+)$", text, re.M))
    totals = service.engine.statistics
    assert float(values['cat_fast_images_total{outcome="finished"}']) == totals.finished > 0
    assert float(values["cat_fast_ready"]) == float(values["cat_fast_bits_independent"]) == 1
    assert float(values['cat_fast_image_seconds_count{stage="total"}']) > 0
    assert float(values['cat_fast_prediction_error{load="alone"}']) >= 0
    assert float(values["cat_fast_tokens_per_second"]) > 0
    assert 0 < float(values["cat_fast_fill"]) <= 1
    assert float(values["cat_fast_queued"]) == float(values["cat_fast_unfinished"]) == 0
    assert float(values["cat_fast_deadline_missed_total"]) == totals.deadlines_missed
    code, refused = "deadline_unreachable", client.post(GENERATIONS, json=BODY | {"deadline_seconds": 1e-9})
    assert refused.status_code == 422
    assert f'cat_fast_refused_total{{code="{code}"}} 1.0' in client.get("/metrics").text
    assert 'cat_fast_http_seconds_count{route="/v1/images/generations",status="200"}' in values
    state = client.get("/readyz").json()
    assert state["bits_independent_of_neighbours"] is True
    assert state["self_test"]["rows"] >= 16
    assert (state["decode_tier"], state["linear_backend"]) == ("exact", "mkl")


def test_errors_of_predictions_are_shown_apart_for_images_that_share_the_engine(text_pipeline):
    service = make_service(text_pipeline)
    app = create_app(service)

    def draw():
        return TestClient(app).post(GENERATIONS, json=BODY).status_code

    def shown():
        text = TestClient(app).get("/metrics").text
        found = re.findall(r'^cat_fast_prediction_error\{load="(\w+)"\} (\S+)$', text, re.M)
        return {load: float(error) for load, error in found}

    assert draw() == 200
    assert shown().keys() == {"alone"}
    both_queued = threading.Event()
    service.engine.on_step = lambda _: both_queued.wait(60)
    with ThreadPoolExecutor(2) as pool:
        replies = [pool.submit(draw) for _ in range(2)]
        while service.engine.statistics.submitted < 3:
            time.sleep(0.01)
        both_queued.set()
        assert [reply.result() for reply in replies] == [200, 200]
    service.drain()
    errors = shown()
    assert errors.keys() == {"alone", "shared"}
    assert 0 <= errors["shared"] < math.inf


def test_the_decoder_is_compiled_under_its_lock_before_the_server_is_ready(text_pipeline, monkeypatch):
    service = Service(text_pipeline, ServerSettings(name="tiny", max_tokens=128, decode_tier="fast"))
    seen = []

    def compiled(images):
        seen.append((service.engine.stages.vae_lock.locked(), service.ready))
        return images

    compile_to(monkeypatch, compiled)
    assert service.readiness()["decode_tier"] is None
    try:
        service.prepare()
        assert service.readiness()["decode_tier"] == "fast"
        assert set(seen) == {(True, False)}
        service.settings.__dict__["drain_seconds"] = 0.0
        service.drain()
    finally:
        text_pipeline.use_decode_tier("exact")


def test_documentation_and_page(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {GENERATIONS, RECONSTRUCTIONS, "/v1/complexity"} <= set(paths)
    page = client.get("/").text
    assert not re.findall(r"(?:src|href)=\"https?:", page), "the page must not load anything from elsewhere"


def test_every_request_is_logged_with_its_id(client, capfd):
    client.get("/healthz", headers={"x-request-id": "abc-1"})
    client.post(GENERATIONS, json=BODY | {"user": "u-7"}, headers={"x-request-id": "abc-2"})
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    (entry,) = [line for line in lines if line["request_id"] == "abc-1"]
    assert (entry["path"], entry["status"], entry["method"]) == ("/healthz", 200, "GET")
    assert [line["user"] for line in lines if line["request_id"] == "abc-2"] == ["u-7"]


@pytest.mark.parametrize("stream", [False, True])
def test_images_that_the_drain_does_not_finish_are_reported_as_lost(text_pipeline, stream):
    service = make_service(text_pipeline, drain_seconds=0.0)
    body = BODY | {"num_inference_steps": 1000, "scheduler": "ddpm", "n": 2, "stream": stream}
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(TestClient(create_app(service)).post, GENERATIONS, json=body)
        while service.engine.unfinished < 2 or service.engine.waiting:
            time.sleep(0.01)
        service.drain()
        reply = pending.result()
    assert reply.status_code == (200 if stream else 503)
    error = events_of(reply)[-1]["error"] if stream else reply.json()["error"]
    assert error["code"] == "draining"
    assert "images were lost after" in error["message"]
    assert [one["steps"] for one in error["lost"]] == [1000, 1000]
    assert len(service.lost) == 2
    assert service.refusals == {}, "they had been accepted"


def test_a_drain_waits_for_uploads(text_pipeline, monkeypatch):
    service = make_service(text_pipeline, prepared=False)
    started, released, closed = threading.Event(), threading.Event(), threading.Event()
    close = service.engine.close

    def reconstruct(*_):
        started.set()
        assert released.wait(60)
        return {"ratio": 16}

    def observed(**options):
        lost = close(**options)
        closed.set()
        return lost

    monkeypatch.setattr("cat_fast.inference.server.images.reconstruct", reconstruct)
    monkeypatch.setattr(service.engine, "close", observed)
    app, files = create_app(service), {"image": ("x.png", png())}
    with ThreadPoolExecutor(2) as pool:
        upload = pool.submit(TestClient(app).post, RECONSTRUCTIONS, files=files)
        assert started.wait(60)
        drained = pool.submit(service.drain)
        assert closed.wait(60)
        assert wait([drained], timeout=0.2).not_done, "the upload is not complete"
        assert TestClient(app).post(RECONSTRUCTIONS, files=files).status_code == 503
        released.set()
        assert upload.result().json() == {"ratio": 16}
        drained.result(60)
    assert service.reconstructing == 0


def test_a_service_leaves_no_thread_and_no_file_open(text_pipeline):
    def serve():
        service = make_service(text_pipeline)
        for stream in (False, True):
            reply = TestClient(create_app(service)).post(GENERATIONS, json=BODY | {"n": 2, "stream": stream})
            assert reply.status_code == 200
        service.drain()
        return sorted(thread.name for thread in threading.enumerate()), len(os.listdir("/proc/self/fd"))

    before = serve()  # opens what the process keeps
    assert serve() == before


def test_under_load_an_image_that_may_be_coarser_is(text_pipeline):
    service = make_service(text_pipeline, coarser_after=0.0)

    def until_accepted(_):
        while service.engine.statistics.submitted < 2:
            time.sleep(0.005)

    service.engine.on_step = until_accepted
    sample = text_pipeline.plan(["a red house"], ratio=8)[0]
    other = service.engine.submit(EngineRequest(sample=sample, num_inference_steps=100))
    body = BODY | {"ratio": 8, "allow_coarser": True}
    try:
        reply = TestClient(create_app(service)).post(GENERATIONS, json=body).json()
        (image,) = reply["metrics"]["images"]
        assert image["planned_ratio"] == 8
        assert image["ratio"] > 8
    finally:
        other.cancel()
        service.drain()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_cancels_its_images(address, service, stream):
    """As the page's Cancel does with a stream."""
    changes = {"num_inference_steps": 1000, "scheduler": "ddpm", "n": 2, "stream": stream}
    body = json.dumps(BODY | changes).encode()
    host, port = address.removeprefix("http://").split(":")
    before = service.engine.statistics.cancelled
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        while not service.engine.unfinished:
            time.sleep(0.01)
    deadline = time.monotonic() + 30
    while service.engine.unfinished and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.engine.statistics.cancelled == before + 2


def test_the_openai_client_drives_it(address):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    options = {"num_inference_steps": 3, "seed": 5}
    reply = client.images.generate(
        model="tiny", prompt="a red house", n=2, size="64x64", response_format="b64_json", extra_body=options
    )
    assert len(reply.data) == 2
    assert Image.open(io.BytesIO(base64.b64decode(reply.data[0].b64_json))).size == (64, 64)
    stream = client.images.generate(
        model="tiny", prompt="a red house", stream=True, partial_images=2, extra_body=options | {"n": 1}
    )
    kinds = [event.type for event in stream]
    assert "image_generation.completed" in kinds
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="tiny", prompt="a red house", extra_body={"colour": "red"})
    assert (caught.value.code, caught.value.param) == ("unknown_parameter", "colour")


def test_the_openai_client_sends_a_token_and_is_told_to_wait(text_pipeline):
    openai = pytest.importorskip("openai")
    service = make_service(text_pipeline, token=TOKEN, requests_per_minute=2)
    with listening(service) as address:
        clients = [
            openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) for key in ("wrong", TOKEN)
        ]
        with pytest.raises(openai.AuthenticationError):
            clients[0].models.list()
        options = {"num_inference_steps": 2}
        for _ in range(2):
            assert clients[1].images.generate(prompt="a red house", extra_body=options).data[0].b64_json
        with pytest.raises(openai.RateLimitError) as caught:
            clients[1].images.generate(prompt="a red house", extra_body=options)
    service.drain()
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) >= 1
