"""A ready server over a tiny pipeline, in this process and on a port of loopback."""

import io
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from cat_fast.inference.server.app import create_app
from cat_fast.inference.server.run import _Server, bind
from cat_fast.inference.server.service import Service
from cat_fast.inference.server.settings import ServerSettings
from tests.inference.engine.mixes import tiny_pipeline
from tests.inference.tiny_encoder import save_encoder

TOKEN = "a token of the test"
BODY = {"prompt": "a red house", "num_inference_steps": 3, "seed": 5}


def make_service(pipeline, *, prepared=True, **changes):
    """Return a service, ready unless `prepared` is False; the caller ends it with `drain`."""
    service = Service(pipeline, ServerSettings(**{"name": "tiny", "port": 0, "max_tokens": 128} | changes))
    if prepared:
        service.prepare()
    return service


def png(size=(80, 60), **options):
    """Return the bytes of an image file."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **{"format": "PNG"} | options)
    return file.getvalue()


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def text_pipeline(encoder):
    return tiny_pipeline(encoder)


@pytest.fixture(scope="module")
def service(text_pipeline):
    made = make_service(text_pipeline)
    yield made
    made.settings.__dict__["drain_seconds"] = 0.0
    made.drain()


@pytest.fixture(scope="module")
def client(service):
    return TestClient(create_app(service), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def address(service):
    """Address of the service on loopback."""
    with listening(service) as address:
        yield address


@contextmanager
def listening(service):
    """Serve on a free port of loopback within a block; yield the address."""
    import uvicorn

    bound = bind(service.settings)
    server = _Server(
        uvicorn.Config(
            create_app(service),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,  # a browser's idle connections end with it
            lifespan="off",
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
