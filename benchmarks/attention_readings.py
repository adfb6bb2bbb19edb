"""Which reading of the paper's mid-block attention learns better, at nano size?

    python -m benchmarks.attention_readings --json FILE [--steps 400] [--seeds 3] [--out FOLDER]

`mid_block_attention_head_dim: 1` is as many heads as channels, taken literally; the mid block's width is one
head. Both train on the photographs that ship, from the same seeds and so on the same crops and ratios in the
same order, and are compared on held-out photographs. What is interrupted goes on where it stopped.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.shared import machine
from cat_fast import console
from cat_fast.complexity.image_ratios import index_photographs
from cat_fast.config import read_yaml
from cat_fast.data.files import atomic_write, require_writable
from cat_fast.data.photographs import photographs
from cat_fast.errors import UserError
from cat_fast.evaluation.reconstruction import reconstruct, summarize
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.training.launch import default_ranks, launch
from cat_fast.training.loop import EXPORT
from cat_fast.training.metrics.run_log import read_metrics

CONFIG = Path(__file__).parents[1] / "configs/tokenizer/nano.yaml"
WIDTH = read_yaml(CONFIG)["model"]["block_out_channels"][-1]
READINGS = {"heads_of_1": 1, "one_head": WIDTH}
"""Head dimension of the mid blocks' attention."""
SIDE = 512
LAST_STEPS = 50
"""The training loss is its mean over so many steps at the end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare, print and write; returns the exit code, 2 for bad usage or a failed training."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each reading")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/attention_readings"), help="folder of the runs"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further settings of every run")
    given = parser.parse_args(arguments)
    try:
        if given.json is not None:
            require_writable(given.json)
        runs = {
            name: [
                trained(given.out / f"{name}_{seed}", head_dim, seed, given.steps, given.overrides)
                for seed in range(given.seeds)
            ]
            for name, head_dim in READINGS.items()
        }
        result = compared(runs)
        print("\n".join(lines(result)))
        if given.json is not None:
            about = {
                "date": datetime.now(UTC).strftime("%Y-%m-%d"),
                "steps": given.steps,
                **machine.describe(),
            }
            with atomic_write(given.json) as path:
                path.write_text(
                    json.dumps({"benchmark": "attention_readings", **result, "about": about}, indent=2) + "\n"
                )
    except UserError as error:
        console.print_error(error)
        return 2
    return 0


def trained(folder: Path, head_dim: int, seed: int, steps: int, overrides: list[str]) -> dict[str, Any]:
    """Train one model, or go on with it; its loss at the end and its held-out figures per ratio."""
    console.err.print(f"{folder.name}: {len(read_metrics(folder))} of {steps} steps are done")
    settings = [
        f"output_dir={folder}",
        f"seed={seed}",
        f"model.mid_block_attention_head_dim={head_dim}",
        f"schedule.total_steps={steps}",
        f"loss.gan_loss_starting_step={int(0.7 * steps)}",
    ]
    log = folder.with_suffix(".log")
    if not (folder / EXPORT).is_dir():
        launch(CONFIG, [*settings, *overrides], run_folder=folder, log=log, ranks=default_ranks())
    model = NestedAutoencoderKL.from_pretrained(folder / EXPORT)
    held_out = reconstruct(model, index_photographs(photographs("held_out")), SIDE)
    losses = [record["loss"] - record.get("weighted/gan", 0.0) for record in read_metrics(folder)]
    return {
        "seed": seed,
        "training_loss": statistics.fmean(losses[-LAST_STEPS:]),
        "held_out": summarize(held_out)["per_ratio"],
    }


def compared(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Every run, and by how much heads of one dimension are ahead of one head, seed by seed."""
    pairs = list(zip(runs["heads_of_1"], runs["one_head"], strict=True))
    ahead = {
        "training_loss": [theirs["training_loss"] - ours["training_loss"] for ours, theirs in pairs],
        "psnr": [mean_of(ours, "psnr") - mean_of(theirs, "psnr") for ours, theirs in pairs],
        "perceptual": [mean_of(theirs, "perceptual") - mean_of(ours, "perceptual") for ours, theirs in pairs],
    }
    return {"heads_of_1_ahead_by": ahead, "runs": runs}


def mean_of(run: Mapping[str, Any], figure: str) -> float:
    return statistics.fmean(at[figure] for at in run["held_out"].values())


def lines(result: Mapping[str, Any]) -> list[str]:
    """The comparison for people."""
    told = []
    for name, runs in result["runs"].items():
        for run in runs:
            figures = ", ".join(
                f"{ratio}x {at['psnr']:.2f} dB / {at['perceptual']:.3f}"
                for ratio, at in run["held_out"].items()
            )
            told.append(f"{name}, seed {run['seed']}: loss {run['training_loss']:.4f}; {figures}")
    for figure, values in result["heads_of_1_ahead_by"].items():
        told.append(f"heads of 1 ahead in {figure}: " + ", ".join(f"{value:+.4f}" for value in values))
    return told


if __name__ == "__main__":
    sys.exit(main())
