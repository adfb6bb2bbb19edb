"""Golden losses: the losses of the first steps of both nano runs, at toy size, on one rank and thread.

    python -m tests.training.golden_losses        measure them again into tests/training/golden/

`test_golden_losses.py` explains a difference and when to measure again.
"""

import json
import platform
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.shared.random_latents import write_latents
from cat_fast.processor import processor_name
from cat_fast.training.metrics.run_log import read_metrics
from tests.training.rank_processes import run_ranks
from tests.training.runs import GENERATOR, TOKENIZER

FOLDER = Path(__file__).with_name("golden")
STEPS = 20
RUNS = {
    "tokenizer": TOKENIZER,
    "tokenizer_without_perceptual": [*TOKENIZER, "loss.perceptual_weight=0.0"],
    "generator": GENERATOR,
}
"""The second is that of the GPU check, whose machine lacks the weights of the perceptual distance."""
COMMON = [
    f"schedule.total_steps={STEPS}",
    "schedule.warmup_steps=2",
    f"checkpoint.every_steps={STEPS}",
    "optimizer.weight_decay=1.0",  # strong enough that its absence shows within these steps
]
PACKAGES = ("torch", "torchvision", "deepspeed", "diffusers", "numpy", "pillow")


def main() -> None:
    for kind, arguments in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            steps = train(kind, [*arguments, *COMMON], Path(folder) / "run")
        golden = {"made_with": made_with(), "arguments": [*arguments, *COMMON], "steps": steps}
        path = FOLDER / f"{kind}.json"
        path.write_text(json.dumps(golden, indent=1) + "\n")
        print(f"{path}: loss {steps[0]['loss']:.6g} to {steps[-1]['loss']:.6g}")


def train(kind: str, arguments: list[str], run: Path) -> list[dict[str, float]]:
    """Train in the folder `run`; return the losses of each step."""
    latents = run.with_name("latents")
    if kind == "generator" and not latents.exists():
        write_latents(latents)
    more = [f"output_dir={run}", *([f"data.latents={latents}"] if kind == "generator" else [])]
    run_ranks("tests.training.runs:train_as_rank", 1, *arguments, *more)
    return [_losses(record) for record in read_metrics(run)]


def _losses(record: dict[str, float]) -> dict[str, float]:
    """Return the losses of a record, without times, amounts, weighted terms and terms per ratio."""
    return {
        name: value
        for name, value in record.items()
        if name == "loss" or (f"weighted/{name}" in record and not re.search(r"_\d+x$", name))
    }


def made_with() -> dict[str, str]:
    found = {name: version(name) for name in PACKAGES}
    return {
        **found,
        "python": platform.python_version(),
        "processor": processor_name() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


if __name__ == "__main__":
    main()
