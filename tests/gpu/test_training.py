"""Both nano runs through DeepSpeed on a GPU, with NCCL: their losses are those of the CPU's golden files."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.cpu_random import CpuRandomness
from benchmarks.gpu.golden_run import differences, golden, train
from benchmarks.shared.configs import generator_run
from benchmarks.shared.random_latents import write_latents

ROOT = Path(__file__).parents[2]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_losses_are_those_of_the_cpu(kind, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    latents = write_latents(tmp_path / "latents")
    found = train(kind, tmp_path / "run", latents)
    assert not differences(kind, found)


@pytest.mark.gpu
def test_ranks_on_two_gpus_communicate_by_nccl(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    from tests.training.runs import command

    arguments = ["schedule.total_steps=3", "precision=bf16"]
    environment = {**os.environ, "DS_ACCELERATOR": "cuda"}
    for kind in ("tokenizer", "generator"):
        out = tmp_path / kind
        ran = subprocess.run(
            command(kind, out, write_latents(tmp_path / f"latents_{kind}"), *arguments),
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
        assert json.loads((out / "summary.json").read_text())["steps"] == 3


def test_random_numbers_of_the_cpu_are_used_on_other_devices():
    torch.manual_seed(0)
    expected = [torch.rand(3), torch.randn(2, 2), torch.randint(9, (4,)), torch.empty(5).uniform_()]
    torch.manual_seed(0)
    with CpuRandomness():
        drawn = [
            torch.rand(3, device="cpu"),
            torch.randn_like(torch.empty(2, 2)),
            torch.randint(9, (4,), device="cpu"),
            torch.empty(5).uniform_(),
        ]
    assert all(map(torch.equal, drawn, expected))


def test_a_loss_past_the_tolerance_is_reported():
    steps = golden("generator")["steps"]
    assert differences("generator", steps) == []
    wrong = [{name: value * (1 + 2e-3) for name, value in step.items()} for step in steps]
    assert len(differences("generator", wrong)) == sum(map(len, steps))
    assert differences("generator", steps[:-1])


@pytest.mark.parametrize(
    ("changes", "compiles"),
    [
        ([], True),
        (["deterministic=true"], False),  # FlashAttention's gradients may vary in compiled blocks
        (["deterministic=true", "compile=true"], True),
    ],
)
def test_deterministic_runs_are_not_compiled_by_default(changes, compiles):
    assert generator_run("cat_xl", changes).compiles("cuda") == compiles
