"""Rates and totals of a run, compared with values computed by hand."""

import json

import pytest
import torch

from cat_fast.hardware import Gpu
from cat_fast.training.metrics import throughput
from cat_fast.training.metrics.throughput import (
    Throughput,
    format_rates,
    format_summary,
    matmul_format,
    summarize,
)
from cat_fast.training.runtime.ranks import Ranks

STEP = {"images": 8.0, "tokens": 512.0, "flops": 3e12, "loss": 0.5}


def test_rates_are_amounts_over_seconds_not_means_of_rates():
    rates = Throughput(peak_flops=10e12)
    rates.add(1.0, STEP)
    rates.add(3.0, STEP)
    assert rates.rates() == {
        "steps_per_second": 0.5,
        "images_per_second": 4.0,
        "tokens_per_second": 256.0,
        "flops_per_second": 1.5e12,
        "mfu": 0.15,
    }


def test_only_recent_steps_count():
    rates = Throughput()
    rates.add(1000.0, STEP)  # the first step compiles
    for _ in range(50):
        rates.add(0.5, STEP)
    assert rates.rates()["images_per_second"] == 16.0


def test_missing_amounts_have_no_rate():
    rates = Throughput(peak_flops=1e12)
    assert rates.rates() == {}
    rates.add(2.0, {"loss": 1.0})
    assert rates.rates() == {"steps_per_second": 0.5}


def test_summary_adds_up_records():
    records = [{"step": n, "seconds": 1800.0, **STEP} for n in range(4)]
    assert summarize(records, peak_flops=1e12) == {
        "steps": 4,
        "hours": 2.0,
        "images": 32,
        "tokens": 2048,
        "flops": 12 * 10**12,
        "steps_per_second": 4 / 7200,
        "images_per_second": 32 / 7200,
        "tokens_per_second": 2048 / 7200,
        "flops_per_second": 12e12 / 7200,
        "mfu": pytest.approx(12 / 7200),
    }
    assert summarize([]) == {"steps": 0, "hours": 0.0}


def test_summary_is_formatted_as_one_line():
    summary = {
        "steps": 12_000,
        "hours": 1.5,
        "images": 96_000,
        "tokens": 6_144_000,
        "images_per_second": 17.78,
        "tokens_per_second": 1138.0,
        "flops_per_second": 2.5e12,
        "mfu": 0.314,
        "peak_bytes": 3 * 2**30,
    }
    assert format_summary(summary) == (
        "12,000 steps in 1:30:00, 96,000 images, 6,144,000 tokens, 17.8 images/s, 1,138 tokens/s, "
        "2.5 TFLOP/s, MFU 31.4%, peak memory 3.00 GiB per rank"
    )
    assert format_rates({"flops_per_second": 3.63e9}) == ["3.63 GFLOP/s"]


def test_summary_is_written_atomically(tmp_path):
    throughput.write_summary(tmp_path, {"steps": 3})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    ("precision", "tf32", "dtype"),
    [("bf16", True, "bfloat16"), ("fp32", True, "tf32"), ("fp32", False, "float32")],
)
def test_matrices_are_multiplied_in_tf32_if_torch_allows_it(precision, tf32, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert matmul_format(precision) == dtype


def test_peak_flops_cover_all_ranks(monkeypatch):
    card = Gpu(bytes_per_second=1, tensor_flops_per_second=300.0, float32_flops_per_second=20.0)
    monkeypatch.setattr(throughput.hardware, "gpu_in_use", lambda: card)
    assert throughput.peak_flops(Ranks(rank=0, world_size=64), "bf16") == 64 * 300
    monkeypatch.setattr(throughput.hardware, "gpu_in_use", lambda: None)
    assert throughput.peak_flops(Ranks(), "bf16") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU it is the memory of the process")
def test_peak_memory_includes_a_new_tensor():
    held = torch.ones(32 * 2**20)  # 128 MiB, touched
    before = throughput.peak_bytes(Ranks())
    assert before > held.nbytes
    more = torch.ones(before // 4 + held.numel())
    assert throughput.peak_bytes(Ranks()) >= before + held.nbytes
    assert more.nbytes > before
