"""Tests of a GPU's size and of its streams, devices and copies; on a CPU they run at toy sizes.

Triton kernels run in the interpreter there, so that the tests' own code is checked without a GPU.
"""

from contextlib import contextmanager

import pytest
import torch

from benchmarks.shared.host_device import NoSynchronization
from cat_fast.kernels import backends
from cat_fast.training.runtime.determinism import set_determinism


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the same test runs on the GPU")
    return torch.device(request.param, 0 if request.param == "cuda" else None)


@pytest.fixture
def deterministic(monkeypatch):
    """Flags of a deterministic run, as far as the process has not initialized CUDA."""
    sdp = torch.backends.cuda
    before = sdp.mem_efficient_sdp_enabled(), sdp.flash_sdp_enabled(), sdp.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)
    set_determinism(True)
    yield
    torch.use_deterministic_algorithms(False)
    switches = sdp.enable_mem_efficient_sdp, sdp.enable_flash_sdp, sdp.enable_cudnn_sdp
    for switch, enabled in zip(switches, before, strict=True):
        switch(enabled)


@pytest.fixture
def triton_on_cpu(monkeypatch):
    """Force Triton's interpreter, where there is no GPU."""
    if backends.triton_is_interpreted():
        monkeypatch.setenv("CAT_FAST_BACKEND", "triton")


@contextmanager
def no_synchronization(device):
    """Fail where the host would wait for the device; meta tensors stand for those of a GPU."""
    if device.type == "meta":
        with NoSynchronization("meta"):
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
