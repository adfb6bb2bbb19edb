"""Compare two readings of the paper's mid-block attention by training both at nano size.

    python -m benchmarks.attention_readings --json FILE [--steps 400] [--seeds 3] [--out FOLDER]

`mid_block_attention_head_dim: 1`, taken literally, means one head per channel; the other reading is one head
as wide as the mid block. Both train on the shipped photographs with the same seeds, and therefore on the same
crops and ratios in the same order, and are compared on held-out photographs. Interrupted runs resume, with
the same settings only.
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
from cat_fast.complexity.ratios.image_ratios import index_photographs
from cat_fast.config import read_yaml
from cat_fast.data.files import atomic_write, require_writable, write_json
from cat_fast.data.photographs import photographs
from cat_fast.errors import UserError
from cat_fast.evaluation.reconstruction import reconstruct, summarize
from cat_fast.processes.signals import run_command
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
"""Number of final steps over which the training loss is averaged."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare, print and write. Return the exit code: 2 for invalid usage or a failed training run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--steps", type=int, default=400, help="training steps per run")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs per reading")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/attention_readings"), help="folder for the runs"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="more settings for every run")
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
    """Train one model, or resume it. Return its final loss and held-out metrics per ratio."""
    console.err.print(f"{folder.name}: {len(read_metrics(folder))} of {steps} steps done")
    settings = [
        f"output_dir={folder}",
        f"seed={seed}",
        f"model.mid_block_attention_head_dim={head_dim}",
        f"schedule.total_steps={steps}",
        f"loss.gan_loss_starting_step={int(0.7 * steps)}",
    ]
    log = folder.with_suffix(".log")
    settings += overrides
    require_same_settings(folder, settings)
    if not (folder / EXPORT).is_dir():
        launch(CONFIG, settings, run_folder=folder, log=log, ranks=default_ranks())
    model = NestedAutoencoderKL.from_pretrained(folder / EXPORT)
    held_out = reconstruct(model, index_photographs(photographs("held_out")), SIDE)
    losses = [record["loss"] - record.get("weighted/gan", 0.0) for record in read_metrics(folder)]
    return {
        "seed": seed,
        "training_loss": statistics.fmean(losses[-LAST_STEPS:]),
        "held_out": summarize(held_out)["per_ratio"],
    }


def require_same_settings(folder: Path, settings: list[str]) -> None:
    """Record the settings of a new run, or compare them with those of an existing one.

    Raises:
        UserError: the run has other settings, or no record of them.
    """
    record = folder.with_suffix(".settings.json")
    before = json.loads(record.read_text(encoding="utf-8"))["settings"] if record.exists() else []
    if folder.exists() and before != settings:
        other = sorted(set(before) ^ set(settings))
        raise UserError(
            f"{folder} was trained with other settings ({', '.join(other)} differ); delete it, or choose "
            "another --out"
        )
    write_json(record, {"settings": settings})


def compared(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return every run, and the lead of heads of one dimension over one head, per seed."""
    pairs = list(zip(runs["heads_of_1"], runs["one_head"], strict=True))
    ahead = {
        "training_loss": [theirs["training_loss"] - ours["training_loss"] for ours, theirs in pairs],
        "psnr": [mean_of(ours, "psnr") - mean_of(theirs, "psnr") for ours, theirs in pairs],
        "perceptual": [mean_of(theirs, "perceptual") - mean_of(ours, "perceptual") for ours, theirs in pairs],
    }
    return {"heads_of_1_ahead_by": ahead, "runs": runs}


def mean_of(run: Mapping[str, Any], metric: str) -> float:
    return statistics.fmean(at[metric] for at in run["held_out"].values())


def lines(result: Mapping[str, Any]) -> list[str]:
    """Return the comparison as lines of text."""
    text = []
    for name, runs in result["runs"].items():
        for run in runs:
            figures = ", ".join(
                f"{ratio}x {at['psnr']:.2f} dB / {at['perceptual']:.3f}"
                for ratio, at in run["held_out"].items()
            )
            text.append(f"{name}, seed {run['seed']}: loss {run['training_loss']:.4f}; {figures}")
    for metric, values in result["heads_of_1_ahead_by"].items():
        text.append(f"heads of 1 ahead in {metric}: " + ", ".join(f"{value:+.4f}" for value in values))
    return text


if __name__ == "__main__":
    sys.exit(run_command(main))
