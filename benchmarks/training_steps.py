"""Complete training steps of tokenizer and transformer: images/s, tokens/s, FLOPs per image, and MFU on GPUs.

    python -m benchmarks.training_steps --json FILE [--quick] [--only TEXT]

A step of the tokenizer is that of `cat-fast plan cost`: all loss terms, the discriminator, AdamW. A step of
the transformer is a packed batch of the paper's mix of 197 tokens: forward, backward, AdamW. Neither loads
data nor communicates. Rounds alternate over all cases; figures are medians, with quartiles. MFU is relative
to the data sheet of the GPU, so on a CPU there is none. `--quick` measures the nano models only.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import packing
from benchmarks.shared import machine
from benchmarks.shared.harness import Spread, rounded
from benchmarks.shared.mixes import MIXES
from benchmarks.shared.simple_program import about
from cat_fast import console, hardware
from cat_fast.data.files import atomic_write, require_writable
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command
from cat_fast.training.config.load import load_run
from cat_fast.training.config.settings import GeneratorRun, TokenizerRun
from cat_fast.training.metrics.flops import DiTFlops, TokenizerFlops, token_count
from cat_fast.training.metrics.throughput import matmul_format
from cat_fast.training.tokenizer.synthetic_step import Workload

CONFIGS = Path(__file__).parents[1] / "configs"
DEVICE = packing.DEVICE
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Step:
    """One kind of step, ready to run."""

    run: Callable[[], object]
    images: int
    tokens: float
    flops: float
    precision: str


def tokenizer_step(config: str, ratio: int, images: int, overrides: Sequence[str] = ()) -> Step:
    """Set up a step of a configuration in configs/tokenizer."""
    run = load_run(str(CONFIGS / f"tokenizer/{config}.yaml"), list(overrides))
    assert isinstance(run, TokenizerRun)
    torch.manual_seed(0)
    workload = Workload(run, DEVICE)
    batch = workload.batch(ratio, images)
    flops = TokenizerFlops(run, workload.objective, workload.discriminator)
    return Step(
        run=lambda: workload.step(batch),
        images=images,
        tokens=images * token_count(ratio, run.data.crop_size),
        flops=flops.of(ratio, images, workload.adversarial),
        precision=run.precision,
    )


def transformer_step(config: str, max_tokens: int) -> Step:
    """Set up a step of a configuration in configs/generator, on packed images of all ratios."""
    run = load_run(str(CONFIGS / f"generator/{config}.yaml"), [])
    assert isinstance(run, GeneratorRun)
    arguments = {"in_channels": 16, **run.model, "class_dropout_prob": 0.0}
    arguments.pop("ratios", None)
    lengths = packing.compose_lengths(MIXES["197"], max_tokens)
    trainer = packing.Trainer(packing.build(arguments))
    batch = packing.make_batch(lengths, arguments)
    parts = list(packing.ours(batch.packed))
    return Step(
        run=lambda: trainer.step(parts, batch.noise),
        images=len(lengths),
        tokens=sum(lengths),
        flops=DiTFlops(arguments).of(lengths),
        precision="bf16" if packing.AUTOCAST else "fp32",
    )


def steps(quick: bool) -> dict[str, Callable[[], Step]]:
    """Return the cases by name."""
    found: dict[str, Callable[[], Step]] = {
        f"tokenizer.nano.{ratio}x": partial(tokenizer_step, "nano", ratio, 4) for ratio in (8, 16, 32)
    }
    found["transformer.dit_s"] = lambda: transformer_step("dit_s", 1344 if quick else 16_384)
    if not quick:
        plain = ["discriminator.pretrained="]
        for ratio in (8, 16, 32):
            images = 8 if DEVICE == "cuda" else 1
            found[f"tokenizer.cat_c16.{ratio}x"] = partial(tokenizer_step, "cat_c16", ratio, images, plain)
        found["transformer.cat_xl"] = lambda: transformer_step("cat_xl", 16_384 if DEVICE == "cuda" else 1344)
    return found


def measure(cases: Mapping[str, Callable[[], Step]], rounds: int) -> dict[str, dict[str, Any]]:
    """Time the steps in alternating rounds; the first one warms up."""
    made = {name: make() for name, make in cases.items()}
    taken: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds + 1):
        order = list(made) if number % 2 else list(reversed(made))
        for name in order:
            machine.synchronize()
            start = time.perf_counter()
            made[name].run()
            machine.synchronize()
            if number:
                taken[name].append(time.perf_counter() - start)
    return {name: figures(step, taken[name]) for name, step in made.items()}


def figures(step: Step, seconds: Sequence[float]) -> dict[str, Any]:
    """Return rates of a step from the seconds of its rounds; `mfu` is None where no peak is known."""
    spread = Spread.of(seconds)
    gpu = hardware.gpu_in_use()
    peak = gpu.flops_per_second(matmul_format(step.precision)) if gpu else None
    return {
        "right": True,
        "seconds": {"ours": vars(spread)},
        "rates": {"images": step.images / spread.median, "tokens": step.tokens / spread.median},
        "images": step.images,
        "tokens": step.tokens,
        "flops_per_image": step.flops / step.images,
        "gflops_per_second": step.flops / spread.median / 1e9,
        "mfu": step.flops / spread.median / peak if peak else None,
        "precision": step.precision,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write. Return 2 for invalid usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--quick", action="store_true", help="nano models and a small transformer only")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    given = parser.parse_args(arguments)
    try:
        cases = {name: make for name, make in steps(given.quick).items() if given.only in name}
        if not cases:
            raise UserError(f"--only {given.only}: expected part of one of {', '.join(steps(given.quick))}")
        if given.json:
            require_writable(given.json)
        load = os.getloadavg()[0]
        found = measure(cases, 1 if given.quick else ROUNDS)
    except UserError as error:
        console.print_error(error)
        return 2
    for name, row in found.items():
        mfu = f", MFU {row['mfu']:.1%}" if row["mfu"] else ""
        print(
            f"{name}: {row['rates']['images']:.4g} images/s, {row['rates']['tokens']:.4g} tokens/s, "
            f"{row['flops_per_image'] / 1e9:.4g} GFLOPs/image, {row['gflops_per_second']:.4g} GFLOP/s{mfu}"
        )
    if given.json:
        content = rounded({"cases": found, "about": about("training_steps", load)})
        with atomic_write(given.json) as part:
            part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
