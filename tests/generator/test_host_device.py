"""A training step and a sampling step of the DiT never wait for the device, nor copy from the host to it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.shared.host_device import NoSynchronization, Synchronized
from cat_fast.generator import PackedText
from cat_fast.generator.diffusion import diffusion_loss, make_schedule
from cat_fast.generator.dit import DiT
from cat_fast.packing import PackedSequence
from cat_fast.packing.transfer import copy_together

MODEL = {"in_channels": 4, "hidden_size": 64, "depth": 2, "num_heads": 2, "num_classes": 3}
OPTIONS = [{}, {"text_dim": 8, "pooled_text": True}, {"rope": True, "qk_norm": True, "shared_adaln": True}]


def on_device(device, text_dim=None):
    """Return a packed batch of 3 sequences on a device, and its text."""
    packed = PackedSequence(
        tokens=torch.empty(21, 16, device=device),
        cu_seqlens=torch.empty(4, dtype=torch.int32, device=device),
        grid=torch.empty(3, 2, dtype=torch.int32, device=device),
        ratio=torch.empty(3, dtype=torch.int32, device=device),
        label=torch.empty(3, dtype=torch.int64, device=device),
        max_seqlen=16,
    )
    if text_dim is None:
        return packed, None
    tokens = torch.empty(6, text_dim, device=device)
    cu_seqlens = torch.empty(4, dtype=torch.int32, device=device)
    return packed, PackedText(tokens=tokens, cu_seqlens=cu_seqlens, max_seqlen=4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_a_training_step(options, prediction):
    device = torch.device("meta")
    with device:
        model = DiT(**MODEL, **options)
    packed, text = on_device(device, options.get("text_dim"))
    schedule = make_schedule(prediction)
    flow = {"noise_shift_tokens": 64.0} if prediction == "flow" else {"min_snr_gamma": 5.0}

    def step():
        diffusion_loss(model, packed, None, schedule, text=text, **flow).loss.backward()

    step()  # moves the schedule's table once
    with NoSynchronization("meta") as watched:
        step()
    assert watched.launches["aten.mm"] + watched.launches["aten.addmm"] > 20


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_forward_pass_of_a_training_step_on_a_fake_gpu(options):
    """The kernels are those of a GPU. torch's backward pass needs a GPU: it is tested on meta tensors."""
    schedule = make_schedule("flow")
    with FakeTensorMode():
        with torch.device("cuda"):
            model = DiT(**MODEL, **options)
        packed, text = on_device(torch.device("cuda"), options.get("text_dim"))
        diffusion_loss(model, packed, None, schedule, text=text, noise_shift_tokens=64.0)
        with NoSynchronization("cuda") as watched:
            loss = diffusion_loss(model, packed, None, schedule, text=text, noise_shift_tokens=64.0).loss
    assert (loss.device.type, loss.requires_grad) == ("cuda", True)
    assert watched.launches


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_sampling_step_on_a_fake_gpu(options, monkeypatch):
    """Fake CUDA tensors need no GPU; the kernels are those that a GPU would run."""
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            model = DiT(**MODEL, **options).eval()
        packed, text = on_device(torch.device("cuda"), options.get("text_dim"))
        timesteps = torch.empty(3, device="cuda")
        with NoSynchronization("cuda") as watched:
            out = model(packed, timesteps, text=text, return_dict=False)[0]
    assert (out.device.type, out.shape) == ("cuda", (21, 16))
    assert watched.launches


WAITS = {
    "item": lambda x: x.sum().item(),
    "mask": lambda x: x[x > 0],
    "to the device": lambda x: torch.ones(3).to(x.device),
    "to the host": lambda x: torch.empty(3).copy_(x),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_found(name):
    with FakeTensorMode():
        x = torch.empty(3, device="cuda")
        with pytest.raises(Synchronized), NoSynchronization("cuda"):
            WAITS[name](x)


def test_small_tensors_share_one_copy():
    tensors = [
        torch.tensor([3, 1]),
        torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32),
        torch.tensor([0.5]),
        torch.empty(0, dtype=torch.int32),
    ]

    class Device:
        type = "other"

    copies = []
    real = torch.Tensor.to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor, "to", lambda self, *a, **k: copies.append(k) or real(self, torch.device("cpu"))
        )
        moved = copy_together(tensors, Device())
    assert copies == [{"non_blocking": True}]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(moved, tensors, strict=True))
