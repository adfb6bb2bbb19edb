"""Complete steps with the linear layers' fp32 products by MKL and by oneDNN, on a CPU.

    python -m benchmarks.linear --json FILE [--quick]

Training of DiT-S/2, DiT-B/2 and the nano transformer on packed images, of the nano tokenizer, denoising steps
with guidance, and decoding by CAT's tokenizer with attention in its middle block. Rounds alternate. Seconds
are those of the clock, on all threads. The A/A ratio, MKL against itself in the same rounds, is the noise.
`auto` is what `linear_backend: auto` chooses here. --quick measures one round of small cases.

Further rounds time every operator, for the share of products in a step by MKL.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.packing import compose_lengths
from benchmarks.shared import simple_program
from benchmarks.shared.breakdown import Recorder
from benchmarks.shared.harness import Spread
from benchmarks.shared.mixes import MAX_TOKENS, MIXES
from benchmarks.shared.steps import Generation, Step, TokenizerTraining, TransformerTraining
from cat_fast.kernels.linear.op import calibrate, require, using
from cat_fast.processes.malloc import keep_freed_memory
from cat_fast.processes.signals import run_command

MIN_ROUNDS, MAX_ROUNDS, SECONDS = 3, 15, 10.0
"""Rounds per case: as many as `SECONDS` allow, within these numbers."""
NANO = {8: [64] * 16, 16: [16] * 64}
"""Tokens of the images of a batch of the nano transformer, by ratio: 1,024 of 128 px."""
NANO_SIDE = 128
SIDES = {"mkl": "mkl", "onednn": "onednn", "mkl again": "mkl"}
PRODUCTS = {"products": ("addmm", "mm")}
"""Parts of the names of MKL's products; those of attention are within other operators."""
RECORDED = 3
"""Rounds in which every operator is timed."""


def steps(quick: bool) -> dict[str, Callable[[], Step]]:
    """Return functions that set up each kind of step."""
    found: dict[str, Callable[[], Step]] = {
        "transformer.nano.8x": lambda: TransformerTraining("nano").step(NANO[8], NANO_SIDE),
        "transformer.nano.16x": lambda: TransformerTraining("nano").step(NANO[16], NANO_SIDE),
    }
    found["tokenizer.nano.16x"] = lambda: TokenizerTraining("nano").step(16, 4)
    found["sampling.nano.16x"] = lambda: Generation("nano").denoise(NANO[16], NANO_SIDE)
    if not quick:
        mix = MIXES["197"]
        found["sampling.dit_s"] = lambda: Generation("dit_s").denoise(compose_lengths(mix, 1344))
        found["transformer.dit_s"] = lambda: TransformerTraining("dit_s").step(
            compose_lengths(mix, MAX_TOKENS)
        )
        found["decoder.cat_c16.8x"] = lambda: Generation("dit_s").decode(8)
        found["transformer.dit_b"] = lambda: TransformerTraining("dit_b").step(compose_lengths(mix, 4096))
    return found


def measure(quick: bool) -> dict[str, Any]:
    """Return seconds and ratios per kind of step, and the choice of `auto`."""
    require("onednn")
    keep_freed_memory()  # as in training
    cases = {}
    for name, make in steps(quick).items():
        step = make()
        found = compare(step, 1 if quick else MAX_ROUNDS)
        cases[name] = found | {"share_of_products": share_of_products(step, 1 if quick else RECORDED)}
        del step
        gc.collect()  # frees the model before the next one is built
    return {"auto": calibrate(), "threads": torch.get_num_threads(), "cases": cases}


def compare(step: Step, max_rounds: int, seconds: float = SECONDS) -> dict[str, Any]:
    """Return seconds of a step per library, and their ratios, of alternating rounds."""
    taken: dict[str, list[float]] = {name: [] for name in SIDES}
    for backend in dict.fromkeys(SIDES.values()):  # warms up
        _seconds(step, backend)
    start = time.perf_counter()
    for number in range(max_rounds):
        if number >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name in SIDES if number % 2 else reversed(SIDES):
            taken[name].append(_seconds(step, SIDES[name]))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    return {
        "images": step.images,
        "tokens": step.tokens,
        "rounds": len(taken["mkl"]),
        "step_seconds": {name: vars(Spread.of(values)) for name, values in taken.items()},
        "images_per_second": {name: step.images / median for name, median in medians.items()},
        "gflops_per_second": {name: step.flops / median / 1e9 for name, median in medians.items()},
        "mkl_over_onednn": vars(Spread.of(_ratios(taken["mkl"], taken["onednn"]))),
        "mkl_over_mkl": vars(Spread.of(_ratios(taken["mkl"], taken["mkl again"]))),
    }


def share_of_products(step: Step, rounds: int) -> float:
    """Return the share of a step by MKL that is products of linear layers."""
    shares = []
    for _ in range(rounds):
        with using("mkl"), Recorder(PRODUCTS) as recorder:
            step.run()
        shares.append(recorder.seconds["products"] / sum(recorder.seconds.values()))
    return statistics.median(shares)


def _seconds(step: Step, backend: str) -> float:
    with using(backend):
        start = time.perf_counter()
        step.run()
        return time.perf_counter() - start


def _ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(first, second, strict=True)]


def lines(found: Mapping[str, Any]) -> list[str]:
    """Format the ratios."""
    rows = [f"auto chooses {found['auto']} with {found['threads']} threads"]
    for name, case in found["cases"].items():
        ratio, noise = case["mkl_over_onednn"], case["mkl_over_mkl"]
        rows.append(
            f"{name}: oneDNN {ratio['median']:.2f} times as fast as MKL ({ratio['low']:.2f} to"
            f" {ratio['high']:.2f}); MKL against itself {noise['median']:.2f}; products are"
            f" {case['share_of_products']:.0%} of the step by MKL"
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write. Return 2 for invalid usage."""
    return simple_program.main("linear", __doc__ or "", measure, lines, arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
