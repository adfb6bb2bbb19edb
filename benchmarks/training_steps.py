"""Complete training steps of tokenizer and transformer, and generation: rates, FLOPs, memory, MFU.

    python -m benchmarks.training_steps --json FILE [--quick] [--only TEXT]

A step of the tokenizer is that of `cat-fast plan cost`: all loss terms, the discriminator, AdamW. A step of
the transformer is a packed batch: forward, backward, AdamW. Neither loads data nor communicates.

`fixed_8x`, `fixed_16x`, `fixed_32x` and `mix` compare fixed ratios with CAT's mix on ImageNet, 6 / 49 / 45 %
at 8x / 16x / 32x, at 512 px: `train.transformer` on equally many tokens of DiT-S/2; `generate` with DiT-S/2,
guidance and CAT's decoder, of whose 250 denoising steps one is measured; `train.tokenizer` with CAT's
tokenizer, which at each ratio runs the layers of the fixed one. `composed_of` lists the steps per image of a
row that was not measured itself.

Cases that share a model alternate in rounds; figures are medians, with quartiles. Peak memory excludes
weights and states of the optimizer. MFU is relative to the data sheet of the GPU, so on a CPU there is none.
The file is written after every round, and lists the cases that it lacks, also after `--only`. `--quick`
measures the nano tokenizer and a small batch of DiT-S/2.
"""

import argparse
import gc
import operator
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import packing
from benchmarks.shared import machine
from benchmarks.shared.compact_json import write_compact
from benchmarks.shared.harness import Spread, rounded
from benchmarks.shared.mixes import MIXES
from benchmarks.shared.simple_program import about
from benchmarks.shared.steps import (
    DEVICE,
    GUIDANCE,
    SIDE,
    STEPS,
    Generation,
    Step,
    TokenizerTraining,
    TransformerTraining,
)
from cat_fast import console, hardware
from cat_fast.data.files import require_writable
from cat_fast.errors import UserError
from cat_fast.processes.malloc import keep_freed_memory
from cat_fast.processes.signals import run_command
from cat_fast.training.metrics.throughput import matmul_format

ROUNDS, MIN_ROUNDS, LONG = 3, 2, 180.0
"""Rounds of a group of cases; after `MIN_ROUNDS`, none starts later than after `LONG` seconds."""
RATIOS = (8, 16, 32)
MAX_TOKENS = 16_384 if DEVICE == "cuda" else 4096
"""Tokens of a batch of DiT-S/2."""
SMALL = 1344
"""Tokens of one image at each ratio."""
MIX = MIXES["216"]
"""Shares on ImageNet, by number of tokens."""
SHARES = {packing.ratio_of(tokens): share for tokens, share in MIX.items()}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cases that share a model."""

    setup: Callable[[], Any]
    """Returns what the steps share."""
    steps: Mapping[str, Callable[[Any], Step]]
    """Set up a step, by name of its case."""
    totals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Cases that follow from these: number of steps of each per image."""

    def only(self, text: str) -> "Group":
        """Return the cases whose name contains a text, and those that they follow from."""
        totals = {name: parts for name, parts in self.totals.items() if text in name}
        needed = {part for parts in totals.values() for part in parts}
        steps = {name: make for name, make in self.steps.items() if text in name or name in needed}
        return Group(setup=self.setup, steps=steps, totals=totals)


def batches(max_tokens: int) -> dict[str, list[int]]:
    """Return the numbers of tokens of a batch's images: fixed ratios, and CAT's mix."""
    fixed = {f"fixed_{packing.ratio_of(tokens)}x": [tokens] * (max_tokens // tokens) for tokens in MIX}
    return fixed | {"mix": packing.compose_lengths(MIX, max_tokens)}


def groups(quick: bool) -> list[Group]:
    """Return all cases. Each group's model is built when it is measured, since all do not fit in memory."""
    nano = Group(
        setup=partial(TokenizerTraining, "nano"),
        steps={
            f"tokenizer.nano.{ratio}x": partial(TokenizerTraining.step, ratio=ratio, images=4)
            for ratio in RATIOS
        },
    )
    own = {"transformer.dit_s": packing.compose_lengths(MIXES["197"], SMALL if quick else MAX_TOKENS)}
    compared = {} if quick else {f"train.transformer.{name}": n for name, n in batches(MAX_TOKENS).items()}
    small = Group(
        setup=partial(TransformerTraining, "dit_s"),
        steps={
            name: partial(TransformerTraining.step, lengths=lengths)
            for name, lengths in (own | compared).items()
        },
    )
    return [nano, small] if quick else [nano, small, *_large()]


def _large() -> list[Group]:
    images = 8 if DEVICE == "cuda" else 1
    tokens = 16_384 if DEVICE == "cuda" else SMALL
    step = "train.tokenizer.fixed_{}x".format
    return [
        Group(
            setup=partial(TokenizerTraining, "cat_c16", ["discriminator.pretrained="]),
            steps={
                step(ratio): partial(TokenizerTraining.step, ratio=ratio, images=images) for ratio in RATIOS
            },
            totals={"train.tokenizer.mix": {step(ratio): share for ratio, share in SHARES.items()}},
        ),
        Group(
            setup=partial(TransformerTraining, "cat_xl"),
            steps={"transformer.cat_xl": lambda t: t.step(packing.compose_lengths(MIXES["197"], tokens))},
        ),
        Group(
            setup=partial(Generation, "dit_s"),
            steps={
                **{
                    f"denoise.{name}": partial(Generation.denoise, lengths=n)
                    for name, n in batches(MAX_TOKENS).items()
                },
                **{f"decode.{ratio}x": partial(Generation.decode, ratio=ratio) for ratio in RATIOS},
            },
            totals={
                **{f"generate.fixed_{f}x": {f"denoise.fixed_{f}x": STEPS, f"decode.{f}x": 1} for f in RATIOS},
                "generate.mix": {
                    "denoise.mix": STEPS,
                    **{f"decode.{ratio}x": share for ratio, share in SHARES.items()},
                },
            },
        ),
    ]


def measure(group: Group, rounds: int) -> Iterator[dict[str, Row]]:
    """Yield the rows of a group after each round. An untimed round measures memory and warms up."""
    shared = group.setup()
    steps = {name: make(shared) for name, make in group.steps.items()}
    peaks = {name: machine.peak_bytes(step.run) for name, step in steps.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    for number in range(rounds):
        for name in list(steps) if number % 2 else reversed(steps):
            machine.synchronize()
            before = time.perf_counter()
            steps[name].run()
            machine.synchronize()
            taken[name].append(time.perf_counter() - before)
        rows = {name: figures(step, taken[name]) for name, step in steps.items()}
        rows |= {name: total(parts, steps, taken) for name, parts in group.totals.items()}
        for name, row in rows.items():
            known = [peak for part in group.totals.get(name, {name: 1}) if (peak := peaks[part]) is not None]
            row["peak_bytes"] = {"ours": max(known, default=None)}
        yield rows
        if number + 1 >= MIN_ROUNDS and time.perf_counter() - start > LONG:
            return


def figures(step: Step, seconds: Sequence[float]) -> Row:
    """Return rates of a step from the seconds of its rounds; `mfu` is None where no peak is known."""
    spread = Spread.of(seconds)
    return {
        "right": True,
        "seconds": {"ours": vars(spread)},
        "rates": {"images": step.images / spread.median, "tokens": step.tokens / spread.median},
        "images": step.images,
        "tokens": step.tokens,
        "flops_per_image": step.flops / step.images,
        "gflops_per_second": step.flops / spread.median / 1e9,
        "mfu": _mfu(step.flops / spread.median, step.precision),
        "precision": step.precision,
    }


def total(parts: Mapping[str, float], steps: Mapping[str, Step], taken: Mapping[str, Sequence[float]]) -> Row:
    """Return the row of one image that takes several steps, from the seconds of their rounds."""
    one = {name: count / steps[name].images for name, count in parts.items()}
    rounds = zip(*(taken[name] for name in parts), strict=True)
    seconds = [sum(map(operator.mul, one.values(), values)) for values in rounds]
    spread = Spread.of(seconds)
    flops = sum(share * steps[name].flops for name, share in one.items())
    precision = steps[next(iter(parts))].precision
    return {
        "right": True,
        "seconds": {"ours": vars(spread)},
        "rates": {"images": 1 / spread.median},
        "images": 1,
        "flops_per_image": flops,
        "gflops_per_second": flops / spread.median / 1e9,
        "mfu": _mfu(flops / spread.median, precision),
        "precision": precision,
        "composed_of": dict(parts),
    }


def _mfu(flops_per_second: float, precision: str) -> float | None:
    gpu = hardware.gpu_in_use()
    return flops_per_second / gpu.flops_per_second(matmul_format(precision)) if gpu else None


def line(name: str, row: Mapping[str, Any]) -> str:
    """Format a row as text."""
    rates = ", ".join(f"{value:.4g} {unit}/s" for unit, value in row["rates"].items())
    peak = row["peak_bytes"]["ours"]
    memory = "" if peak is None else f", {peak / 2**20:.0f} MiB"
    mfu = f", MFU {row['mfu']:.1%}" if row.get("mfu") else ""
    return (
        f"{name}: {rates}, {row['flops_per_image'] / 1e9:.4g} GFLOPs/image, "
        f"{row['gflops_per_second']:.4g} GFLOP/s{memory}{mfu}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write. Return 2 for invalid usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--quick", action="store_true", help="nano tokenizer and a small batch only")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    given = parser.parse_args(arguments)
    every = groups(given.quick)
    chosen = [part for group in every if (part := group.only(given.only)).steps]
    found: dict[str, Row] = {}
    missing, load = names_of(every), os.getloadavg()[0]

    def save() -> None:
        if given.json:
            described = about("training_steps", load, quick=given.quick)
            write(given.json, found, described | ({"missing": missing} if missing else {}))

    try:
        if not chosen:
            raise UserError(f"--only {given.only}: expected part of one of {', '.join(names_of(every))}")
        if given.json:
            require_writable(given.json)
        if DEVICE == "cpu":  # as in training
            keep_freed_memory()
        for group in chosen:
            rows: dict[str, Row] = {}
            for rows in measure(group, 1 if given.quick else ROUNDS):
                found |= rows
                save()
            missing = [name for name in missing if name not in names_of([group])]
            save()
            gc.collect()  # frees the model before the next one is built
            print("\n".join(line(name, row) for name, row in rows.items()), flush=True)
    except UserError as error:
        console.print_error(error)
        return 2
    return 0


def names_of(groups: Iterable[Group]) -> list[str]:
    """Return the names of all cases of some groups."""
    return [name for group in groups for name in (*group.steps, *group.totals)]


def write(path: Path, cases: Mapping[str, Row], described: Mapping[str, Any]) -> None:
    """Write the rows so far, the settings of the comparison, and a description of the machine and the run."""
    compared = {
        "side": SIDE,
        "shares": {f"{ratio}x": share for ratio, share in SHARES.items()},
        "denoising_steps": STEPS,
        "guidance": GUIDANCE,
    }
    content = rounded({"cases": cases, "compared": compared, "about": described})
    write_compact(path, content)


if __name__ == "__main__":
    sys.exit(run_command(main))
