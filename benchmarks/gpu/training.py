"""Both nano runs through DeepSpeed on one rank, killed and resumed, and sampling in fp32 and bf16."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import golden_run
from benchmarks.gpu.blocks import RUNS
from benchmarks.gpu.body import Context
from benchmarks.shared.random_latents import write_latents
from benchmarks.shared.random_text_encoder import save_random_encoder
from cat_fast.generator import DiT
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.hardware import run_device_type
from cat_fast.weights.shipped import installed_folder

KILL_AFTER, SAVE_EVERY = 8, 5
"""Steps after which a run is killed, and between its checkpoints."""
IMAGES, STEPS = 64, 30


def training(context: Context) -> None:
    """Record the differences of losses from the CPU's golden files, and the rate of sampling."""
    folder = context.work / "training"
    folder.mkdir()
    latents = write_latents(folder / "latents")
    wrong = []
    runs = {kind: Run(kind, folder / kind, latents) for kind in RUNS}
    for run in runs.values():  # side by side
        run.start()
    killed = _kill_all(list(runs.values()), context)
    before = {kind: golden_run.read_losses(run.folder) for kind, run in runs.items()}
    for run in runs.values():
        run.start()
    for run in runs.values():
        run.wait(context)
    for kind, run in runs.items():
        losses = golden_run.read_losses(run.folder)
        first = golden_run.largest_difference(kind, before[kind])
        resumed = golden_run.largest_difference(kind, losses)
        context.record.figure(f"{kind}.largest_difference", first, "relative", steps=len(before[kind]))
        if run in killed:
            context.record.figure(f"{kind}.resumed_difference", resumed, "relative", steps=len(losses))
        else:
            context.record.skipped(f"{kind}.resumed_difference", "the run ended before it was killed")
        wrong += [f"{kind}: {line}" for line in golden_run.differences(kind, losses)]
    if wrong:
        raise RuntimeError(f"losses differ from the golden files: {'; '.join(wrong[:5])}")
    _sample(context)


class Run:
    """One nano run in a process of its own."""

    def __init__(self, kind: str, folder: Path, latents: Path) -> None:
        self.kind, self.folder, self.latents = kind, folder, latents
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the run, or resume it."""
        more = [f"checkpoint.every_steps={SAVE_EVERY}", "logging.every_steps=1"]
        self.process = subprocess.Popen(
            golden_run.command(self.kind, self.folder, self.latents, *more),
            cwd=golden_run.ROOT,
            env=golden_run.environment(),
            stdout=sys.stdout,
            stderr=sys.stderr,
        )

    def has_reached(self, step: int) -> bool:
        """Return True if the run has logged as many steps, or has ended.

        Raises:
            RuntimeError: it failed.
        """
        assert self.process is not None
        if self.process.poll():
            raise RuntimeError(f"{self.kind}: it failed with exit code {self.process.returncode}")
        return self.process.returncode == 0 or len(golden_run.read_losses(self.folder)) >= step

    def kill(self) -> bool:
        """Kill the run; return False if it had ended before."""
        assert self.process is not None
        self.process.kill()
        return self.process.wait() != 0

    def wait(self, context: Context) -> None:
        """Wait for the end of the run."""
        assert self.process is not None
        code = self.process.wait(max(1.0, context.left))
        if code:
            raise RuntimeError(f"{self.kind}: it failed with exit code {code} after it was resumed")


def _kill_all(runs: Sequence[Run], context: Context) -> list[Run]:
    """Kill each run once it has logged `KILL_AFTER` steps; return those that had not ended before."""
    waiting, killed = list(runs), []
    while waiting:
        for run in [run for run in waiting if run.has_reached(KILL_AFTER)]:
            waiting.remove(run)
            if run.kill():
                killed.append(run)
        if context.left <= 0:
            raise TimeoutError(f"{waiting[0].kind}: step {KILL_AFTER} was not reached")
        time.sleep(0.01)
    return killed


def _sample(context: Context) -> None:
    """Sample from the shipped models; noise is the same on every device and in every dtype.

    Their text encoder (90 MB) is not brought along: one of the same size, with random weights, takes as long.
    """
    from cat_fast.inference import CATPipeline

    folder = installed_folder("nano")
    encoder = TextEncoder(
        save_random_encoder(
            context.work / "text_encoder", (), width=384, layers=6, heads=12, hidden=1536, max_tokens=128
        )
    )
    device = torch.device(run_device_type())
    images, steps = (3, 2) if context.dry else (IMAGES, STEPS)
    results = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        transformer = DiT.from_pretrained(folder / "transformer")
        transformer.register_to_config(text_encoder_fingerprint=encoder.fingerprint())
        pipeline = CATPipeline.from_pretrained(str(folder), text_encoder=encoder, transformer=transformer)
        pipeline.to(device, dtype)
        pipeline.set_progress_bar_config(disable=True)
        prompts = [pipeline.descriptions[i % len(pipeline.labels)].caption for i in range(images)]
        ratios = sorted(pipeline.transformer.config.ratios)
        requests = [
            request
            for number, ratio in enumerate(ratios)
            for request in pipeline.plan(prompts[number :: len(ratios)], ratio=ratio, seed=number)
        ]
        options: dict[str, Any] = {"num_inference_steps": steps, "output_type": "pt"}
        if not context.dry:
            pipeline.draw(requests[:8], **options)  # warms up
        started = time.perf_counter()
        drawn = [
            image
            for batch in pipeline.batches(requests)
            for image in pipeline.draw([requests[i] for i in batch], **options)
        ]
        results[name] = torch.stack([image.float().cpu() for image in drawn])
        seconds = time.perf_counter() - started
        context.record.figure(f"sampling.{name}.images_per_second", images / seconds, "images/s", steps=steps)
    difference = (results["fp32"] - results["bf16"]).square().mean().sqrt().item()
    context.record.figure("sampling.bf16_difference", difference, "RMS in [0, 1]")
