"""GPUs are looked up by the exact names that CUDA reports; device of runs."""

import pytest
import torch

from cat_fast.complexity.scorers.language_model.loading import choose_device
from cat_fast.errors import UserError
from cat_fast.hardware import GPUS, gpu_of, run_device_type
from cat_fast.models.device import find_device
from cat_fast.training.launch import default_ranks
from cat_fast.training.runtime import step_context
from cat_fast.training.runtime.ranks import Ranks


@pytest.mark.parametrize(
    ("name", "tensor", "single"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("A100-SXM4-40GB", 312e12, 19.5e12),  # the name from older drivers
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA H100 NVL", 835e12, 60e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA B200", 2250e12, 75e12),
    ],
)
def test_peak_throughput_of_known_gpus(name, tensor, single):
    gpu = gpu_of(name)
    assert gpu is not None
    assert gpu.flops_per_second("bfloat16") == gpu.flops_per_second("float16") == tensor
    assert gpu.flops_per_second("tf32") == tensor / 2
    assert gpu.flops_per_second("float32") == single


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",  # a seventh of the card
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GH200 480GB MIG 1g.12gb",
        "Tesla K80",
    ],
)
def test_similar_names_are_not_matched(name):
    assert gpu_of(name) is None


def test_every_name_matches_exactly_one_entry():
    for name in GPUS:
        assert [known for known in GPUS if f" NVIDIA {name}".endswith(f" {known}")] == [name]


@pytest.mark.parametrize(
    ("available", "variable", "expected"),
    [
        (True, None, "cuda"),
        (False, None, "cpu"),
        (True, "cpu", "cpu"),
        (True, "cuda", "cuda"),
        (True, "", "cuda"),
    ],
)
def test_one_variable_decides_the_device_of_runs(monkeypatch, available, variable, expected):
    """Training, commands with device "auto" and captioners agree, also where a GPU is present."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if variable is not None:
        monkeypatch.setenv("DS_ACCELERATOR", variable)
    assert run_device_type() == find_device("auto").type == Ranks(local_rank=1).device.type == expected
    if expected == "cpu":
        assert choose_device(None).type == "cpu"
        assert default_ranks() <= 2
        assert isinstance(step_context._now(), float)


def test_an_impossible_device_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(UserError, match="no CUDA device is available"):
        run_device_type()
    monkeypatch.setenv("DS_ACCELERATOR", "tpu")
    with pytest.raises(UserError, match="expected cuda or cpu"):
        run_device_type()
