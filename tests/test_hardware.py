"""GPUs are looked up by the exact names that CUDA reports; rounding of matrix products."""

import pytest
import torch

from cat_fast.hardware import GPUS, gpu_of, row_invariant_block


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
        "NVIDIA GH200 480GB",
        "Tesla K80",
    ],
)
def test_similar_names_are_not_matched(name):
    assert gpu_of(name) is None


def test_every_name_matches_exactly_one_entry():
    for name in GPUS:
        assert [known for known in GPUS if f" NVIDIA {name}".endswith(f" {known}")] == [name]


def test_matrix_products_of_this_machine_are_invariant_in_some_block():
    block = row_invariant_block(torch.float32)
    assert block in (1, 8, 16, 32, 64)
    x, weight = torch.randn(8 * block, 384), torch.randn(100, 384)
    full = torch.nn.functional.linear(x, weight)
    for rows in range(block, 8 * block, block):
        assert torch.equal(torch.nn.functional.linear(x[:rows], weight), full[:rows])


def test_products_that_depend_on_the_number_of_rows_are_found(monkeypatch):
    linear = torch.nn.functional.linear

    def sensitive(x, weight):
        return linear(x, weight) + (1 if len(x) < 32 else 0)

    monkeypatch.setattr(torch.nn.functional, "linear", sensitive)
    assert row_invariant_block(torch.float32) == 32
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: linear(x, weight) + len(x))
    assert row_invariant_block(torch.float32) is None
