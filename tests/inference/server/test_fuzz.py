"""No input makes the server answer with a 5xx: Schemathesis on its own OpenAPI, and mutated image uploads."""

import contextlib
import io
import random

import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image
from starlette.testclient import TestClient

from cat_fast.inference.server.app import create_app
from cat_fast.inference.server.errors import ApiError
from cat_fast.inference.server.images import read_image
from cat_fast.inference.server.settings import RECONSTRUCTIONS
from tests.inference.server.conftest import make_service, png


@pytest.fixture(scope="module")
def unlimited(text_pipeline):
    service = make_service(text_pipeline, requests_per_minute=0)
    yield service
    service.settings.__dict__["drain_seconds"] = 0.0
    service.drain()


def mutated(rng, data):
    """Return an image file with bytes changed, cut, repeated or inserted."""
    kind, at = rng.randrange(5), rng.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + rng.randbytes(rng.randrange(1, 64)) + data[at:]
    if kind == 2:
        return data[:at] + data[at // 2 :]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 2, 8, 64])):
        changed[rng.randrange(min(len(changed), 64 if kind == 3 else len(changed)))] = rng.randrange(256)
    return bytes(changed)


def upload_mutations(unlimited, count):
    client = TestClient(create_app(unlimited), raise_server_exceptions=False)
    rng = random.Random(0)
    kinds = [png(format=kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
    statuses = set()
    for i in range(count):
        data = mutated(rng, kinds[i % len(kinds)])
        reply = client.post(RECONSTRUCTIONS, files={"image": ("x", data)})
        assert reply.status_code < 500, (i, reply.text)
        statuses.add(reply.status_code)
    return statuses


def test_mutated_uploads(unlimited, monkeypatch):
    # the decoder is not under test, and takes most of the time
    monkeypatch.setattr("cat_fast.inference.server.images.reconstruct", lambda *_: {})
    assert upload_mutations(unlimited, 60) == {200, 400, 415}


def saved(mode, kind="PNG", size=(40, 30)):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


def test_unusual_images_are_reconstructed(unlimited):
    """Scorer and tokenizer take whatever can be decoded."""
    client = TestClient(create_app(unlimited), raise_server_exceptions=False)
    unusual = [saved(mode) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")]
    unusual += [saved("CMYK", "JPEG"), saved("P", "GIF"), saved("YCbCr", "TIFF")]
    unusual += [png(size) for size in ((1, 1), (1, 300), (300, 1), (3000, 2))]
    for i, data in enumerate(unusual):
        reply = client.post(RECONSTRUCTIONS, files={"image": ("x", data)})
        assert reply.status_code == 200, (i, reply.text)


def test_mutated_uploads_that_can_be_decoded_are_reconstructed(unlimited):
    client = TestClient(create_app(unlimited), raise_server_exceptions=False)
    rng = random.Random(1)
    kinds = [png(format=kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
    decodable = 0
    for i in range(300):
        data = mutated(rng, kinds[i % len(kinds)])
        with contextlib.suppress(ApiError):
            read_image(data)
            decodable += 1
            reply = client.post(RECONSTRUCTIONS, files={"image": ("x", data)})
            assert reply.status_code == 200, (i, reply.text)
        if decodable == 30:
            break
    assert decodable == 30


@pytest.mark.slow
def test_two_thousand_mutated_uploads(unlimited):
    """Those that can be decoded are reconstructed, too."""
    assert upload_mutations(unlimited, 2000) == {200, 400, 415}


def call_every_operation(service, examples):
    """Call every operation of the server's OpenAPI with generated arguments."""
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service))
    called = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy())
        def one(case):
            if isinstance(case.body, dict) and "prompt" in case.body:
                steps = case.body.get("num_inference_steps")
                if steps is None or isinstance(steps, int):
                    case.body["num_inference_steps"] = min(2 if steps is None else steps, 2)  # time
            reply = case.call()
            assert reply.status_code < 500, reply.text

        one()
        called += 1
    return called


def test_schemathesis_finds_no_server_error(unlimited):
    assert call_every_operation(unlimited, 8) >= 6


@pytest.mark.slow
def test_schemathesis_finds_no_server_error_in_many_calls(unlimited):
    assert call_every_operation(unlimited, 200) >= 6
