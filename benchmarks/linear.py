"""Complete training steps with the linear layers' fp32 products by MKL and by oneDNN, on a CPU.

    python -m benchmarks.linear --json FILE [--quick]

Rounds alternate. Seconds are those of the processor, over all threads, so that other processes count little.
The A/A ratio, MKL against itself in the same rounds, is the noise. `auto` is what `linear_backend: auto`
chooses here. --quick measures one round of the nano models.
"""

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.shared import simple_program
from benchmarks.shared.harness import Spread
from benchmarks.training_steps import Step, tokenizer_step, transformer_step
from cat_fast.kernels.linear.op import calibrate, require, using
from cat_fast.processes.signals import run_command

ROUNDS = 7
SIDES = {"mkl": "mkl", "onednn": "onednn", "mkl again": "mkl"}


def measure(quick: bool) -> dict[str, Any]:
    """Return seconds and ratios per kind of step, and the choice of `auto`."""
    require("onednn")
    steps = {
        "transformer.dit_s": transformer_step("dit_s", 1344),
        "tokenizer.nano.16x": tokenizer_step("nano", 16, 4),
    }
    if not quick:
        steps["transformer.dit_b"] = transformer_step("dit_b", 1344)
    return {
        "auto": calibrate(),
        "threads": torch.get_num_threads(),
        "cases": {name: compare(step, 1 if quick else ROUNDS) for name, step in steps.items()},
    }


def compare(step: Step, rounds: int) -> dict[str, Any]:
    """Return processor seconds of a step per library, and their ratios, of alternating rounds."""
    taken: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(rounds + 1):
        for name in SIDES if number % 2 else reversed(SIDES):
            with using(SIDES[name]):
                start = time.process_time()
                step.run()
                seconds = time.process_time() - start
            if number:  # the first round warms up
                taken[name].append(seconds)
    first = taken["mkl"]
    return {
        "images": step.images,
        "processor_seconds": {name: vars(Spread.of(values)) for name, values in taken.items()},
        "gflops_per_processor_second": {
            name: step.flops / statistics.median(values) / 1e9 for name, values in taken.items()
        },
        "mkl_over_onednn": vars(Spread.of(_ratios(first, taken["onednn"]))),
        "mkl_over_mkl": vars(Spread.of(_ratios(first, taken["mkl again"]))),
    }


def _ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(first, second, strict=True)]


def lines(found: Mapping[str, Any]) -> list[str]:
    """Format the ratios."""
    rows = [f"auto chooses {found['auto']} with {found['threads']} threads"]
    for name, case in found["cases"].items():
        ratio, noise = case["mkl_over_onednn"], case["mkl_over_mkl"]
        rows.append(
            f"{name}: oneDNN {ratio['median']:.2f} times as fast as MKL ({ratio['low']:.2f} to"
            f" {ratio['high']:.2f}); MKL against itself {noise['median']:.2f}"
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write. Return 2 for invalid usage."""
    return simple_program.main("linear", __doc__ or "", measure, lines, arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
