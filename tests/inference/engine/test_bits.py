"""Bits of an image do not depend on others in flight: alone equals packed, from the text to the decoder."""

from contextlib import contextmanager

import pytest
import torch

from cat_fast.data.images.io import tensor_to_image
from cat_fast.inference.engine import EngineRequest, PackedEngine
from cat_fast.kernels.linear.op import using
from tests.inference.engine.mixes import check_mixes, tiny_pipeline
from tests.inference.tiny_encoder import save_encoder
from tests.kernels.onednn import needs_onednn

FLOW = {"prediction": "flow", "rope": True, "swiglu": True}


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def with_text(encoder):
    return tiny_pipeline(encoder)


@pytest.mark.parametrize(
    ("count", "mixes", "backend"),
    [
        (1, 10, "mkl"),
        (2, 3, "mkl"),
        pytest.param(1, 3, "onednn", marks=needs_onednn),
        pytest.param(2, 3, "onednn", marks=needs_onednn),
    ],
)
def test_mixes_through_text_and_decoder(with_text, count, mixes, backend):
    with threads(count), using(backend):
        check_mixes(with_text, mixes, seed=count, pool=6 * count, text=True, decode=True)


@pytest.mark.parametrize(
    ("dtype", "backend", "options"),
    [
        (torch.float32, "mkl", {"num_heads": 4}),  # head dimension 16: SDPA instead of the C++ kernel
        (torch.float32, "mkl", FLOW),
        pytest.param(torch.float32, "onednn", FLOW, marks=needs_onednn),
        (torch.bfloat16, "mkl", {"shared_adaln": True, "qk_norm": True}),
    ],
)
def test_mixes(dtype, backend, options):
    pipeline = tiny_pipeline(**options).to(dtype)
    with using(backend):
        check_mixes(pipeline, 6, seed=3, pool=10, flow="prediction" in options)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("case", "dtype", "backend", "options"),
    [
        (0, torch.float32, "mkl", {}),
        pytest.param(1, torch.float32, "onednn", {}, marks=needs_onednn),
        (2, torch.bfloat16, "mkl", {}),
        (3, torch.float32, "mkl", FLOW),
        pytest.param(4, torch.float32, "onednn", FLOW, marks=needs_onednn),
    ],
)
def test_a_thousand_mixes(encoder, case, dtype, backend, options, count):
    """1,000 mixes per number of threads over all cases, whose seeds differ; 100 are decoded.

    Takes about two minutes.
    """
    pipeline = tiny_pipeline(encoder, **options).to(dtype)
    mix = {"pool": 24, "text": True, "flow": options is FLOW}
    with threads(count), using(backend):
        for i in range(9):
            check_mixes(pipeline, 20, seed=100 * case + i, **mix)
        check_mixes(pipeline, 20, seed=100 * case + 99, **mix, decode=True)


@pytest.mark.parametrize("backend", ["mkl", pytest.param("onednn", marks=needs_onednn)])
def test_the_png_is_the_same_alone_and_in_a_call_of_many(with_text, backend):
    options = {"num_inference_steps": 3, "scheduler": "ddpm", "guidance_scale": 2.0}
    prompts = ["a red house", "0", "a blue sky a newspaper page", "a newspaper page"]
    with using(backend):
        requests = with_text.plan(prompts, seed=7)
        together = with_text.draw(requests, **options)
        assert len({request.num_tokens for request in requests}) > 1
        for request, image in zip(requests, together, strict=True):
            (own,) = with_text.draw([request], **options)
            assert own.tobytes() == image.tobytes()
            engine = PackedEngine(with_text, 64)
            handle = engine.submit(EngineRequest(sample=request, **options))
            engine.run()
            assert tensor_to_image(handle.result().image).tobytes() == own.tobytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_agree(encoder, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on by default, with larger errors
    requests = tiny_pipeline(encoder).plan(["a red house", "a blue sky"], seed=1)
    options = {"num_inference_steps": 4, "scheduler": "ddpm", "output_type": "pt"}
    cpu, gpu = (tiny_pipeline(encoder).to(device).draw(requests, **options) for device in ("cpu", "cuda"))
    for one, other in zip(cpu, gpu, strict=True):
        torch.testing.assert_close(one, other.cpu(), atol=1e-4, rtol=0)
