"""Both nano runs through DeepSpeed on a GPU, with NCCL: their losses are those of the CPU's golden files."""

import json
import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.cpu_random import CpuRandomness
from benchmarks.gpu.golden_run import differences, golden, train
from benchmarks.shared.configs import generator_run
from benchmarks.shared.random_latents import write_latents
from cat_fast.generator import PackedText
from cat_fast.packing import PackedSequence
from cat_fast.training.generator.packed_batches import PackedBatches
from tests.training.generator.test_packed_batches import streamed

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


class FakeStream:
    """A stream of a device; `log` has the calls of all streams."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))

    def record_event(self):
        self.log.append((self.name, "records"))
        return len([entry for entry in self.log if entry[1] == "records"])

    def wait_event(self, event):
        self.log.append((self.name, "waits for", event))


def test_batches_are_read_on_a_stream_of_their_own(tmp_path, monkeypatch):
    """Captions are encoded during a step; the step's stream waits for the events of its batches."""
    log, kept, threads = [], set(), []
    main = FakeStream(log, "main")

    def encode(captions):
        log.append(("encoder", "encodes"))
        return PackedText.of([torch.zeros(2, 3)] * len(captions))

    def select(stream):
        threads.append((threading.current_thread().name, stream.name))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(log, "reader"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "set_stream", select)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: kept.add((id(x), stream.name)))
    monkeypatch.setattr(PackedSequence, "to", lambda packed, device: packed)
    latents, stream = streamed(write_latents(tmp_path / "latents"))
    options = {"patch_size": 2, "prefetch": 2, "device": torch.device("cuda"), "encode": encode}
    batches = PackedBatches(latents, stream, **options)
    taken, _ = batches.take(2)
    batches.close()
    assert threads == [("latents_0", "reader")]
    assert log[0] == ("reader", "waits for", "main")
    read = [entry for entry in log[1:] if entry[0] != "main"]
    assert read[:4] == [("encoder", "encodes"), ("reader", "records")] * 2
    assert [entry[2] for entry in log if entry[0] == "main"] == [1, 2]
    for batch in taken:
        for part in (batch.packed, batch.text):
            tensors = [value for value in vars(part).values() if isinstance(value, torch.Tensor)]
            assert len(tensors) >= 2
            assert {(id(x), "main") for x in tensors} <= kept
