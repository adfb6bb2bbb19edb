"""Time and memory of evaluations at the sizes of the published protocols, and whether they keep their bounds.

    python -m benchmarks.evaluation --json FILE [--only NAME] [--quick]

statistics    mean and covariance of 50,000 x 2,048 features, streamed: at most 300 MB
square_root   Fréchet distance of two covariances of 2,048 x 2,048: at most 60 s
neighbours    precision and recall of 50,000 samples and 10,000 references: at most 1.5 GB and 10 minutes
metrics       PSNR, SSIM, LPIPS and Inception features of an image of 256 px: at most 0.5 s on two cores
training      share of a run's time for evaluations at the default interval, nano tokenizer: at most 5 %

Bounds on time are compared with CPU seconds of all threads, which other programs change little: on two idle
cores the run takes at most as long. Memory is the peak above that of the process before. `--quick` divides
all sizes by 16. Exit code 1: a bound is exceeded.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.shared import machine
from benchmarks.shared.configs import tokenizer_run
from cat_fast import console
from cat_fast.data.files import atomic_write, require_writable
from cat_fast.data.image_batch import ImageBatch
from cat_fast.errors import UserError
from cat_fast.evaluation.distances.frechet import frechet_distance
from cat_fast.evaluation.distances.neighbours import precision_recall
from cat_fast.evaluation.distances.statistics import FeatureStatistics, Gaussian
from cat_fast.evaluation.features.inception import InceptionV3
from cat_fast.evaluation.metrics import perceptual_distances, psnr, ssim
from cat_fast.evaluation.proxy import as_bytes
from cat_fast.processes.signals import run_command
from cat_fast.tokenizer.perceptual import LPIPS
from cat_fast.training.metrics.held_out_evaluation import HeldOutEvaluation
from cat_fast.training.metrics.reconstruction_grid import GridImages
from cat_fast.training.tokenizer.synthetic_step import Workload

BOUNDS = {
    "statistics": {"bytes": 300e6},
    "square_root": {"cpu_seconds": 60.0},
    "neighbours": {"cpu_seconds": 600.0, "bytes": 1.5e9},
    "metrics": {"cpu_seconds_per_image": 1.0},  # convolutions share two cores: 0.5 s
    "training": {"share": 0.05},
}
STEPS = 12
"""Timed training steps per ratio."""


def statistics(scale: int) -> dict[str, Any]:
    """Stream features in batches of 64, as a network makes them."""
    count, dim = 50_000 // scale, 2048 // scale
    draw = torch.Generator().manual_seed(0)

    def run() -> None:
        found = FeatureStatistics(dim)
        for start in range(0, count, 64):
            found.update(torch.rand(min(64, count - start), dim, generator=draw))
        found.gaussian()

    return _measured(run) | {"images": count, "features": dim}


def square_root(scale: int) -> dict[str, Any]:
    """Compare two covariances whose eigenvalues span six decades."""
    dim = 2048 // scale
    draw = torch.Generator().manual_seed(0)
    gaussians = []
    for _ in range(2):
        factor = torch.randn(dim, dim, generator=draw, dtype=torch.float64)
        factor *= torch.logspace(0, -3, dim, dtype=torch.float64)
        gaussians.append(Gaussian(torch.zeros(dim, dtype=torch.float64), factor @ factor.T, None))
    return _measured(lambda: frechet_distance(*gaussians)) | {"features": dim}


def neighbours(scale: int) -> dict[str, Any]:
    """Compare features that are read from files, as an evaluation's are."""
    counts, dim = (50_000 // scale, 10_000 // scale), 2048 // scale
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        sets = []
        for number, count in enumerate(counts):
            path = Path(folder) / f"{number}.npy"
            array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, dim))
            for start in range(0, count, 1000):
                array[start : start + 1000] = random.normal(size=(min(1000, count - start), dim))
            array.flush()
            del array
            sets.append(path)

        def run() -> None:
            samples, reference = (torch.from_numpy(np.load(path)) for path in sets)
            precision_recall(samples, reference)

        return _measured(run) | {"samples": counts[0], "references": counts[1], "features": dim}


def metrics(scale: int) -> dict[str, Any]:
    """Evaluate eight images with networks of the real sizes and random weights."""
    count, side = 8, 256 // min(scale, 4)
    distance, network = LPIPS("vgg", pretrained=False), InceptionV3()
    x = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = (x * 0.9).clamp(-1, 1)

    @torch.no_grad()
    def run() -> None:
        psnr(x, y)
        ssim(x, y)
        perceptual_distances(distance, x, y)
        network(as_bytes(y))

    run()
    found = _measured(run)
    return found | {"images": count, "side": side, "cpu_seconds_per_image": found["cpu_seconds"] / count}


def training(scale: int) -> dict[str, Any]:
    """Evaluate random images as a run does, and take its training steps, weighted by the shares of ratios."""
    config = tokenizer_run("nano_corpus")
    count = config.evaluation.images // scale
    workload = Workload(config, "cpu")
    pixels = torch.randint(
        256, (count, *workload.size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images = GridImages([Image.fromarray(one.numpy()) for one in pixels], held_out=True)
    held_out = HeldOutEvaluation(images, workload.size, config.data.batch_size, torch.device("cpu"))

    @torch.no_grad()
    def reconstruct(x: torch.Tensor, ratio: int) -> torch.Tensor:
        return workload.model.reconstruct(x, ratio, sample_posterior=False)[0]

    evaluation = _measured(lambda: held_out.evaluate(reconstruct, workload.model.ratios))
    seconds = {}
    for ratio in workload.model.ratios:
        batch = workload.batch(ratio, config.data.batch_size)
        workload.step(batch)
        steps = max(1, STEPS // scale)
        taken = _measured(partial(_repeat, workload, batch, steps))
        seconds[ratio] = taken["cpu_seconds"] / steps
    step = sum(config.sampler.shares[ratio] * seconds[ratio] for ratio in seconds)
    between = config.evaluation.every_steps // scale * step
    return evaluation | {
        "images": count,
        "side": workload.size[0],
        "every_steps": config.evaluation.every_steps // scale,
        "cpu_seconds_per_step": {f"{ratio}x": value for ratio, value in seconds.items()},
        "share": evaluation["cpu_seconds"] / (evaluation["cpu_seconds"] + between),
    }


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "statistics": statistics,
    "square_root": square_root,
    "neighbours": neighbours,
    "metrics": metrics,
    "training": training,
}


def exceeded(name: str, row: dict[str, Any]) -> list[str]:
    """Return the bounds that a row exceeds."""
    return [key for key, limit in BOUNDS[name].items() if row[key] is not None and row[key] > limit]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON. Return 1 if a bound is exceeded, 2 for invalid usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--only", choices=sorted(CASES), help="one case")
    parser.add_argument("--quick", action="store_true", help="divide all sizes by 16")
    given = parser.parse_args(arguments)
    rows = {}
    try:
        if given.json is not None:
            require_writable(given.json)
    except UserError as error:
        console.print_error(error)
        return 2
    for name in [given.only] if given.only else CASES:
        rows[name] = CASES[name](16 if given.quick else 1)
        late = exceeded(name, rows[name])
        size = "unknown" if rows[name]["bytes"] is None else f"{rows[name]['bytes'] / 1e6:.0f} MB"
        times = f"{rows[name]['cpu_seconds']:8.2f} CPU s {rows[name]['seconds']:8.2f} s"
        print(f"{name:<12} {times} {size:>10}  {', '.join(late) or 'within bounds'}", flush=True)
    if given.json is not None:
        about = {
            "benchmark": "evaluation",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            **machine.describe(),
        }
        with atomic_write(given.json) as path:
            report = {"cases": rows, "bounds": BOUNDS, "about": about}
            path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return int(any(exceeded(name, row) for name, row in rows.items()))


def _repeat(workload: Workload, batch: ImageBatch, steps: int) -> None:
    for _ in range(steps):
        workload.step(batch)


def _measured(run: Callable[[], Any]) -> dict[str, Any]:
    load, started, cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
    peak = machine.peak_bytes(run)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "bytes": peak,
        "load": [load, os.getloadavg()[0]],
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
