"""Uploads that a captioner describes, with a captioner that records its calls."""

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from starlette.testclient import TestClient

from cat_fast.complexity import Description
from cat_fast.complexity.captioners.base import DescriptionFailure
from cat_fast.complexity.image_score import GivenLabels
from cat_fast.errors import UserError
from cat_fast.inference.server.app import create_app
from cat_fast.inference.server.describing import FAILED, STOPPING, UploadDescriber
from cat_fast.inference.server.service import Service
from cat_fast.inference.server.settings import RECONSTRUCTIONS, ServerSettings
from tests.inference.server.conftest import png


class Captioner:
    name, version, writes_captions, concurrent = "a captioner", "1", True, False

    def __init__(self):
        self.seen, self.failure = [], None

    def describe_many(self, images, captions=None):
        self.seen += [(image.size, caption) for image, caption in zip(images, captions, strict=True)]
        if isinstance(self.failure, Exception):
            raise self.failure
        if self.failure is not None:
            return [self.failure for _ in images]
        return [Description(caption or "a red chair", True, False) for caption in captions]


@pytest.fixture
def captioner():
    return Captioner()


@pytest.fixture
def upload(text_pipeline, captioner):
    service = Service(text_pipeline, ServerSettings(name="tiny", port=0, max_tokens=128), captioner)
    client = TestClient(create_app(service), raise_server_exceptions=False)
    details = client.get("/v1/models").json()["data"][0]["details"]
    assert details["captioner"] == "a captioner"

    def post(**fields):
        reply = client.post(RECONSTRUCTIONS, files={"image": ("x.png", png())}, data=fields)
        assert reply.status_code == 200, reply.text
        return reply.json()

    return post


def labels(found):
    return found["description"], found["has_text"], found["has_faces"], found["description_error"]


def test_an_upload_without_a_description_gets_one(upload, captioner):
    found = upload()
    assert labels(found) == ("a red chair", True, False, None)
    assert found["scorer"] != "image_student"
    assert captioner.seen == [((80, 60), None)]


def test_what_the_client_sent_is_kept(upload, captioner):
    assert labels(upload(description="a crowd", has_text="false")) == ("a crowd", False, False, None)
    assert captioner.seen == [((80, 60), "a crowd")]
    found = upload(description="a crowd", has_text="false", has_faces="true")
    assert labels(found) == ("a crowd", False, True, None)
    assert len(captioner.seen) == 1


@pytest.mark.parametrize(
    "failure",
    [
        DescriptionFailure("http://internal: no answer"),
        UserError("http://internal: no answer"),
        KeyError("no answer"),
    ],
)
def test_the_pixels_are_scored_if_the_captioner_fails(upload, captioner, failure, capfd):
    captioner.failure = failure
    found = upload()
    assert labels(found) == (None, None, None, FAILED)
    assert found["scorer"] == "image_student"
    assert labels(upload(description="a crowd"))[::3] == ("a crowd", FAILED)
    logged = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "captioner failed" in line]
    assert len(logged) == 2
    assert all("no answer" in entry["error"] for entry in logged)


@pytest.mark.parametrize("concurrent", [False, True])
def test_only_captioners_that_allow_it_are_used_by_several_threads(captioner, concurrent):
    captioner.concurrent = concurrent
    inside, most, together = [], [], threading.Barrier(2)

    def describe_many(images, captions=None):
        inside.append(None)
        most.append(len(inside))
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(30 if concurrent else 0.3)
        inside.pop()
        return [Description("a red chair", False, False)]

    captioner.describe_many = describe_many
    describer = UploadDescriber(captioner, lambda: False)
    image = Image.new("RGB", (8, 8))
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(describer.describe, [image] * 2, [GivenLabels()] * 2))
    assert [description.caption for description, _ in found] == ["a red chair"] * 2
    assert max(most) == (2 if concurrent else 1)
    assert describer.active == 0


def test_a_server_that_stops_asks_no_captioner(captioner):
    describer = UploadDescriber(captioner, lambda: True)
    assert describer.describe(Image.new("RGB", (8, 8)), GivenLabels()) == (None, STOPPING)
    assert captioner.seen == []


def test_detectors_are_not_called_without_a_description(upload, captioner):
    captioner.writes_captions = False
    assert labels(upload()) == (None, None, None, None)
    assert captioner.seen == []
    assert labels(upload(description="a crowd")) == ("a crowd", True, False, None)
