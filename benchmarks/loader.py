"""Images per second from local archives to batches of 512 px crops, by number of decoding processes.

    python -m benchmarks.loader --json FILE

The baselines do the same work on the same archives: webdataset's pipeline in torch's DataLoader with the same
number of processes, and our loader decoding in the training process. One call is one epoch, without reading
ahead into the next one. Memory is not measured, as most of it is that of the processes.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.shared import harness, program
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.photographs import photographs
from cat_fast.data.sampling.step_plan import PerRankPlan
from cat_fast.data.shard_writer import write_shards
from cat_fast.data.streams.decoding import CropSettings, crop_seed, decode_crop
from cat_fast.data.streams.formats.base import Rating
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.formats.remote import Remote
from cat_fast.data.streams.formats.tar import TarShards, list_shards
from cat_fast.data.streams.plan import Mix
from cat_fast.data.streams.source import StreamSource
from cat_fast.processes.signals import run_command

RATIO, BATCH = 16, 8
WORKERS = (1, 2, 4, 8, 16)
"""Numbers of decoding processes, as far as there are cores."""
IMAGES, IMAGES_PER_SHARD = 256, 16
"""As many shards as the largest number of processes, the least that webdataset accepts."""
PREFETCHED = 2
"""Batches read ahead; the DataLoader reads as many per process."""
Crops = list[tuple[str, Tensor]]
"""Keys and (3, H, W) uint8 crops, in any order."""


def case(folder: Path, workers: int, images: int = IMAGES, side: int = 512) -> harness.Case:
    """Return an epoch of `images` (a multiple of `BATCH`), the shipped photographs repeated."""
    settings = CropSettings(side, 1.0)
    shards = _write(folder, images)
    baselines = {
        "webdataset": _webdataset(shards, workers, settings),
        "one_process": _ours(shards, 0, images, settings),
    }
    return harness.Case(
        ours=harness.Contestant(run=_ours(shards, workers, images, settings), outputs=_sorted),
        baselines={name: harness.Contestant(run=run, outputs=_sorted) for name, run in baselines.items()},
        truth=lambda: _sorted(_webdataset(shards, 0, settings)()),
        tolerance=0.0,
        single_process=False,
        rates={"images": images, "images_per_worker": images / workers},
        details={"workers": workers, "images": images, "side": side},
    )


def _write(folder: Path, images: int) -> list[str]:
    shown = photographs()
    records = [
        ImageRecord(
            key=f"{number:06d}",
            path=str(shown[number % len(shown)].path),
            caption="",
            has_text=True,  # baselines do not mirror
            has_faces=False,
            score=5,
            ratio=RATIO,
        )
        for number in range(images)
    ]
    list(write_shards(records, folder, IMAGES_PER_SHARD, seed=0))
    return list_shards(str(folder), Remote(StreamConfig(), ProblemLog()))


def _ours(shards: list[str], workers: int, images: int, settings: CropSettings) -> Callable[[], Crops]:
    config, problems = StreamConfig(workers=workers), ProblemLog()
    source = StreamSource(
        TarShards(shards, Remote(config, problems), problems),
        Rating(lambda labels: labels.ratio),
        lambda shares: PerRankPlan(shares, BATCH, 1, 0),
        Mix({RATIO: 1.0}),
        settings,
        config,
        rank=0,
        world_size=1,
        seed=0,
        problems=problems,
    )

    def epoch() -> Crops:
        batches = []
        for left in reversed(range(images // BATCH)):
            config.prefetch_steps = min(PREFETCHED, left)
            batches.append(source.batch())
        return [
            (k.split(": ")[1], x) for batch in batches for k, x in zip(batch.keys, batch.images, strict=True)
        ]

    return epoch


def _webdataset(shards: list[str], workers: int, settings: CropSettings) -> Callable[[], Crops]:
    """Return a function that yields the same crops as our first epoch."""

    def crop(sample: dict[str, Any]) -> tuple[str, Tensor]:
        key = sample["__key__"]
        data = next(value for name, value in sample.items() if name in ("jpg", "jpeg", "png", "webp"))
        pixels = decode_crop(data, crop_seed(0, 0, RATIO, key), False, settings).pixels
        return key, torch.from_numpy(pixels)

    pipeline = webdataset.WebDataset(shards, shardshuffle=100, seed=0).shuffle(1024).map(crop)
    loader = DataLoader(
        pipeline,
        batch_size=BATCH,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=PREFETCHED if workers else None,
        collate_fn=_stack,
        multiprocessing_context="fork" if workers else None,
    )
    return lambda: [pair for keys, images in loader for pair in zip(keys, images, strict=True)]


def _stack(samples: Crops) -> tuple[list[str], Tensor]:
    return [key for key, _ in samples], torch.stack([pixels for _, pixels in samples])


def _sorted(crops: Crops) -> Sequence[Tensor]:
    return [torch.stack([pixels for _, pixels in sorted(crops, key=lambda pair: pair[0])]).float()]


def main(arguments: Sequence[str] | None = None) -> int:
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            f"workers_{n}": (lambda n=n: case(Path(folder) / str(n), n))
            for n in WORKERS
            if n <= max(2, cores)
        }
        return program.main("the loader of images", cases, arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
