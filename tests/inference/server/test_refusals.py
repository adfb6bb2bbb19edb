"""Requests that are refused before they are queued, each in OpenAI's error shape."""

import json
import struct
import threading
import zlib

import pytest
from PIL import ImageFile, WebPImagePlugin
from starlette.testclient import TestClient

from cat_fast.errors import UserError
from cat_fast.inference.engine import EngineRequest
from cat_fast.inference.server.app import create_app
from cat_fast.inference.server.settings import (
    GENERATIONS,
    MAX_RECONSTRUCTIONS,
    RECONSTRUCTIONS,
    ServerSettings,
)
from tests.inference.engine.mixes import tiny_pipeline
from tests.inference.server.conftest import BODY, TOKEN, make_service, png

TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}
JSON = {"content-type": "application/json"}
LONG = {"num_inference_steps": 1000, "scheduler": "ddpm", "ratio": 8}
VALUE = "invalid_value"
MULTIPART = {"content-type": "multipart/form-data; boundary=x"}
LONG_UPLOAD = MULTIPART | {"content-length": "20000001"}


def header_of_png(width, height):
    """Return a PNG file of one row whose header claims another size."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 + 3 * width))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def header_of_jpeg(width, height):
    """Return a JPEG file whose header claims another size."""
    data = png(format="JPEG")
    at = data.index(b"\xff\xc0\x00\x11\x08") + 5  # after marker, length and precision of the frame
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def header_of_webp(width, height):
    """Return a WebP file whose header claims another size."""
    data = png(format="WEBP")
    at = data.index(b"\x9d\x01\x2a") + 3  # after the start code of the key frame
    return data[:at] + struct.pack("<HH", width, height) + data[at + 4 :]


def body(**changes):
    """Send a request for images; `json.dumps` writes NaN too."""
    return lambda client: client.post(GENERATIONS, content=json.dumps(BODY | changes), headers=JSON)


def body_with(authorization):
    return lambda client: client.post(GENERATIONS, json=BODY, headers={"authorization": authorization})


def content(data, path=GENERATIONS, **headers):
    """Send bytes, or chunks of them."""
    return lambda client: client.post(path, content=data() if callable(data) else data, headers=headers)


def upload(data, **fields):
    return lambda client: client.post(RECONSTRUCTIONS, files={"image": ("x.png", data)}, data=fields)


def get(path):
    return lambda client: client.get(path)


def describe(times=1):
    """Send a description, at most `times` times, until it is refused; return the last reply."""

    def send(client):
        replies = (client.post("/v1/complexity", json={"description": "a cat"}) for _ in range(times))
        return next(reply for reply in replies if reply.status_code != 200)

    return send


def unread():
    pytest.fail("the body was read")
    yield b""


def chunks(count):
    return lambda: (b"x" * 1_000_000 for _ in range(count))


# Identity, settings and state of the service, request, status, code, parameter.
REFUSALS = [
    ("prompt 7", {}, body(prompt=7), 400, VALUE, "prompt"),
    ("prompt None", {}, body(prompt=None), 400, VALUE, "prompt"),
    ("prompt empty", {}, body(prompt=""), 400, VALUE, "prompt"),
    ("prompt blank", {}, body(prompt="  \n"), 400, VALUE, "prompt"),
    ("prompt of 4097 characters", {}, body(prompt="x" * 4097), 400, VALUE, "prompt"),
    ("n 0", {}, body(n=0), 400, VALUE, "n"),
    ("n 11", {}, body(n=11), 400, VALUE, "n"),
    ("n True", {}, body(n=True), 400, VALUE, "n"),
    ("n 2.5", {}, body(n=2.5), 400, VALUE, "n"),
    ("size 64x72", {}, body(size="64x72"), 400, "invalid_size", "size"),
    ("size 256x64", {}, body(size="256x64"), 400, "invalid_size", "size"),
    ("size large", {}, body(size="large"), 400, VALUE, "size"),
    ("size 0x64", {}, body(size="0x64"), 400, VALUE, "size"),
    ("ratio 16 and tokens 4", {}, body(ratio=16, tokens=4), 400, VALUE, "tokens"),
    ("ratio 16 and mean_tokens 4.0", {}, body(ratio=16, mean_tokens=4.0), 400, VALUE, "mean_tokens"),
    ("tokens 16 and mean_tokens 4.0", {}, body(tokens=16, mean_tokens=4.0), 400, VALUE, "mean_tokens"),
    ("ratio 4", {}, body(ratio=4), 400, VALUE, "ratio"),
    ("ratio True", {}, body(ratio=True), 400, VALUE, "ratio"),
    ("tokens 0", {}, body(tokens=0), 400, VALUE, "tokens"),
    ("size 128x128 and tokens 3", {}, body(size="128x128", tokens=3), 400, VALUE, "tokens"),
    ("mean_tokens 0.5", {}, body(mean_tokens=0.5), 400, VALUE, "mean_tokens"),
    ("num_inference_steps 0", {}, body(num_inference_steps=0), 400, VALUE, "num_inference_steps"),
    ("num_inference_steps 1001", {}, body(num_inference_steps=1001), 400, VALUE, "num_inference_steps"),
    (
        "num_inference_steps 1000 and scheduler dpm++",
        {},
        body(num_inference_steps=1000, scheduler="dpm++"),
        400,
        VALUE,
        "num_inference_steps",
    ),
    ("scheduler euler", {}, body(scheduler="euler"), 400, VALUE, "scheduler"),
    ("scheduler heun", {}, body(scheduler="heun"), 400, VALUE, "scheduler"),
    ("guidance_scale nan", {}, body(guidance_scale=float("nan")), 400, VALUE, "guidance_scale"),
    ("guidance_scale inf", {}, body(guidance_scale=float("inf")), 400, VALUE, "guidance_scale"),
    ("guidance_scale high", {}, body(guidance_scale="high"), 400, VALUE, "guidance_scale"),
    ("seed -1", {}, body(seed=-1), 400, VALUE, "seed"),
    ("seed of 65 bits", {}, body(seed=2**64), 400, VALUE, "seed"),
    ("last seed of 65 bits", {}, body(seed=2**64 - 1, n=2), 400, VALUE, "seed"),
    ("colour red", {}, body(colour="red"), 400, "unknown_parameter", "colour"),
    ("user of 257 characters", {}, body(user="x" * 257), 400, VALUE, "user"),
    ("response_format url", {}, body(response_format="url"), 400, VALUE, "response_format"),
    ("model another", {}, body(model="another"), 404, "model_not_found", "model"),
    ("deadline_seconds 0", {}, body(deadline_seconds=0), 400, VALUE, "deadline_seconds"),
    ("prompt missing", {}, content(b'{"n": 1}', **JSON), 400, VALUE, "prompt"),
    ("prompt that is not a class", {"classes": True}, body(), 400, "unknown_class", "prompt"),
    ("n above the queue", {"max_queue": 2}, body(n=3), 400, VALUE, "n"),
    ("not JSON", {}, content(b"{", **JSON), 400, "invalid_json", None),
    ("not text", {}, content(b"\xff\xfe", **JSON), 400, "invalid_json", None),
    ("JSON but not an object", {}, content(b"[1]", **JSON), 400, VALUE, None),
    ("method", {}, get(GENERATIONS), 405, "method_not_allowed", None),
    ("path", {}, get("/v1/nothing"), 404, "not_found", None),
    ("text as image", {}, upload(b"GIF is not here"), 415, "not_an_image", "image"),
    ("document as image", {}, upload(b"%PDF-1.4"), 415, "not_an_image", "image"),
    ("empty image", {}, upload(b""), 415, "not_an_image", "image"),
    ("ICO", {}, upload(png(format="ICO")), 415, "not_an_image", "image"),
    ("PPM", {}, upload(png(format="PPM")), 415, "not_an_image", "image"),
    ("cut PNG", {}, upload(png()[:2000]), 400, "invalid_image", "image"),
    ("cut JPEG", {}, upload(png(format="JPEG")[:2000]), 400, "invalid_image", "image"),
    ("40.1 megapixels", {}, upload(header_of_png(8020, 5000)), 400, "invalid_image", "image"),
    ("image missing", {}, content(b"", RECONSTRUCTIONS), 400, VALUE, "image"),
    ("colour of an upload", {}, upload(png(), colour="red"), 400, "unknown_parameter", "colour"),
    ("long upload", {}, content(unread, RECONSTRUCTIONS, **LONG_UPLOAD), 413, "body_too_large", None),
    (
        "long upload in chunks",
        {},
        content(chunks(21), RECONSTRUCTIONS, **MULTIPART),
        413,
        "body_too_large",
        None,
    ),
    ("long JSON", {}, content(unread, **JSON, **{"content-length": "1000001"}), 413, "body_too_large", None),
    ("long JSON in chunks", {}, content(chunks(2), **JSON), 413, "body_too_large", None),
    ("no token", {"token": TOKEN}, body(), 401, "invalid_api_key", None),
    ("wrong token", {"token": TOKEN}, body_with("Bearer wrong"), 401, "invalid_api_key", None),
    ("token of another scheme", {"token": TOKEN}, body_with(TOKEN), 401, "invalid_api_key", None),
    ("rate", {"requests_per_minute": 6}, describe(100), 429, "rate_limit_exceeded", None),
    ("full queue", {"max_queue": 2, "occupied": True}, body(n=2), 429, "queue_full", None),
    ("too many uploads", {"uploads": MAX_RECONSTRUCTIONS}, upload(png()), 429, "queue_full", None),
    ("deadline", {}, body(**LONG, deadline_seconds=1e-3), 422, "deadline_unreachable", "deadline_seconds"),
    ("starting", {"starting": True}, body(), 503, "not_ready", None),
    ("images while draining", {"draining": True}, body(), 503, "draining", None),
    ("description while draining", {"draining": True}, describe(), 503, "draining", None),
    ("upload while draining", {"draining": True}, upload(png()), 503, "draining", None),
]


@pytest.fixture(scope="module")
def services(text_pipeline):
    """Return the service of settings and a state, made at its first use."""
    made, held = {}, threading.Event()

    def find(given):
        key = tuple(given.items())
        if key not in made:
            made[key] = arranged(**given)
        return made[key]

    def arranged(*, classes=False, occupied=False, uploads=0, starting=False, draining=False, **settings):
        pipeline = tiny_pipeline() if classes else text_pipeline
        service = make_service(pipeline, prepared=not starting, **settings)
        if occupied:  # until the end
            service.engine.on_step = lambda _: held.wait()
            sample = pipeline.plan(["a red house"], ratio=8)[0]
            service.engine.submit(EngineRequest(sample=sample, num_inference_steps=1000))
        if draining:
            service.drain()
        service.reconstructing = uploads
        return service

    yield find
    held.set()
    for service in made.values():
        service.settings.__dict__["drain_seconds"] = 0.0
        service.drain()


@pytest.mark.parametrize(
    ("given", "send", "status", "code", "param"),
    [pytest.param(*row, id=name) for name, *row in REFUSALS],
)
def test_refusals(services, given, send, status, code, param):
    """Each is refused in OpenAI's shape before anything is queued or decoded, and counted."""
    service = services(given)
    client = TestClient(create_app(service))
    submitted, refused = service.engine.statistics.submitted, service.refusals[code]
    reply = send(client)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert error["type"] == TYPES.get(status, "invalid_request_error")
    assert error["message"]
    assert reply.headers["x-request-id"]
    if status == 401:
        assert reply.headers["www-authenticate"] == "Bearer"
    if status in (429, 503):
        assert int(reply.headers["retry-after"]) >= 1
    if status == 422:
        assert error["earliest_seconds"] > 1e-3
    assert service.engine.statistics.submitted == submitted
    assert service.refusals[code] == refused + (reply.request.url.path == GENERATIONS)


def test_messages_of_refusals(services):
    """Refusals that the client can avoid name what it can do."""
    for given, send, words in (
        ({"classes": True}, body(), "the closest are ['0', '1', '2']"),
        ({"max_queue": 2}, body(n=3), "3 images at once can never fit the queue, which holds 2"),
        ({"max_queue": 2, "occupied": True}, body(n=2), "1 requests are unfinished, the limit is 2"),
    ):
        assert words in send(TestClient(create_app(services(given)))).json()["error"]["message"]


@pytest.mark.parametrize("header", [header_of_png, header_of_jpeg, header_of_webp])
def test_images_of_too_many_pixels_are_refused_by_their_headers(services, monkeypatch, header):
    client, data, decoded = TestClient(create_app(services({}))), header(8020, 5000), []

    def record(image):
        decoded.append(image)

    for kind in (ImageFile.ImageFile, WebPImagePlugin.WebPImageFile):
        monkeypatch.setattr(kind, "load", record)
    reply = upload(data)(client)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_image")
    assert "8020 x 5000 pixels is more than" in reply.json()["error"]["message"]
    assert decoded == []


def test_what_is_allowed_where_others_are_refused(services):
    right = TestClient(create_app(services({"token": TOKEN})))
    assert body_with(f"Bearer {TOKEN}")(right).status_code == 200
    draining = TestClient(create_app(services({"draining": True})))
    starting = TestClient(create_app(services({"starting": True})))
    assert [client.get("/readyz").status_code for client in (right, draining, starting)] == [200, 503, 503]
    assert starting.get("/readyz").json()["state"] == "starting"
    for client in (right, draining, starting):
        for path in ("/", "/healthz", "/metrics"):
            assert client.get(path).status_code == 200
    classes = TestClient(create_app(services({"classes": True})))
    assert body(prompt="1")(classes).status_code == 200


def test_uploads_that_ended_make_room_for_others(services):
    service = services({"uploads": MAX_RECONSTRUCTIONS})
    client = TestClient(create_app(service))
    service.reconstructing -= 1
    assert upload(png())(client).status_code == 200
    assert upload(b"")(client).status_code == 415
    assert service.reconstructing == MAX_RECONSTRUCTIONS - 1
    service.reconstructing += 1


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
