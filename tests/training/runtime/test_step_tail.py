"""A step's tail launches a few kernels for all tensors, and a run's flags of determinism."""

import os

import pytest
import torch
from torch import nn

from benchmarks.shared.host_device import NoSynchronization
from cat_fast.hardware import GPUS
from cat_fast.training.health import nan_guard
from cat_fast.training.runtime import determinism, engine
from cat_fast.training.runtime.ema import EMA
from cat_fast.training.runtime.gradient_norm import use_norm


class Many(nn.Module):
    def __init__(self, device="cpu", count=50):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.all = nn.ParameterList(torch.randn(3, 5, generator=generator).to(device) for _ in range(count))


class Engine:
    def __init__(self, module):
        self.module, self.optimizer = module, object()


def test_the_average_is_one_call_for_all_tensors():
    module = Many("meta")
    average = EMA(module, 0.999)
    with NoSynchronization("meta") as watched:
        average.update()
    assert watched.launches == {"aten._foreach_lerp_": 1}


def test_the_averages_are_those_of_each_tensor():
    module = Many()
    average = EMA(module, 0.5)
    before = [tensor.clone() for tensor in average.averaged.values()]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3.0)
    average.update()
    for old, new, parameter in zip(before, average.averaged.values(), module.parameters(), strict=True):
        assert torch.equal(new, old.lerp(parameter, 1 - 0.1))


def test_the_norm_of_all_gradients_is_a_few_calls():
    module = Many()
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    square = nan_guard._square_norm(Engine(module), torch.device("cpu"))
    assert square.item() == pytest.approx(4.0 * 50 * 15, rel=1e-12)
    module.all[7].grad[0, 0] = torch.inf
    assert not torch.isfinite(nan_guard._square_norm(Engine(module), torch.device("cpu")))
    on_meta = Many("meta")
    for parameter in on_meta.parameters():
        parameter.grad = torch.empty_like(parameter)
    with NoSynchronization("meta") as watched:
        nan_guard._square_norm(Engine(on_meta), torch.device("meta"))
    assert sum(watched.launches.values()) < 10


def test_a_known_norm_serves_engines_that_would_compute_it_again():
    class Optimizer:
        cpu_offload = False

        def scaled_global_norm(self, norm_type=2):
            raise AssertionError("computed again")

    engine = Engine(Many())
    use_norm(engine, 4.0)  # an optimiser without ZeRO
    engine.optimizer = Optimizer()
    use_norm(engine, 9.0)
    norm = engine.optimizer.scaled_global_norm()
    assert (norm.item(), norm.dtype, norm.device.type) == (3.0, torch.float32, "cpu")
    engine.optimizer = Optimizer()
    engine.optimizer.cpu_offload = True
    use_norm(engine, 9.0)
    with pytest.raises(AssertionError):
        engine.optimizer.scaled_global_norm()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_adamw_is_fused_and_reductions_overlap_on_gpus(monkeypatch, device):
    pytest.importorskip("deepspeed")  # before AdamW is replaced, from which its classes are derived
    made = {}
    monkeypatch.setattr(engine, "run_device_type", lambda: device)
    monkeypatch.setattr(engine, "_has_several_ranks", lambda: True)
    monkeypatch.setattr("torch.optim.AdamW", lambda parameters, **options: made.update(options))
    monkeypatch.setattr("deepspeed.initialize", lambda **options: (made.update(options["config"]),))
    config = engine.OptimizerConfig()
    engine.make_engine(nn.Linear(2, 2), config, "deepspeed/zero1.json")
    assert made["fused"] == (True if device == "cuda" else None)
    assert made["zero_optimization"]["overlap_comm"] == (device == "cuda")


@pytest.mark.parametrize(("device", "wanted"), [("cuda", True), ("cuda", False), ("cpu", True)])
def test_a_deterministic_run_sets_every_flag(monkeypatch, device, wanted):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(determinism, "run_device_type", lambda: device)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    disabled = []
    for name in ("mem_efficient", "flash", "cudnn"):
        monkeypatch.setattr(
            torch.backends.cuda, f"enable_{name}_sdp", lambda on, name=name: disabled.append(name)
        )
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        determinism.set_determinism(wanted)
        expected = wanted and device == "cuda"
        assert torch.are_deterministic_algorithms_enabled() == expected
        assert torch.backends.cudnn.deterministic == expected
        assert torch.backends.cudnn.benchmark == (device == "cuda" and not wanted)
        assert len(disabled) == 3 * expected
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == expected
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_one_table_lists_the_newest_gpus():
    assert {"H200", "H100 NVL", "GH200 480GB", "B200"} <= GPUS.keys()
