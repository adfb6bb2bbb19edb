"""Two ranks train from shards with a broken image; resumed, they end as an uninterrupted run."""

import tarfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from cat_fast.complexity.ratios.image_ratios import index_photographs
from cat_fast.data.photographs import photographs
from cat_fast.data.shard_writer import write_shards
from cat_fast.training.metrics.run_log import read_metrics
from tests.training.rank_processes import run_ranks
from tests.training.tokenizer.stream_worker import RUNS

WORKER = "tests.training.tokenizer.stream_worker:main"


def write_set(folder: Path) -> Path:
    """Write the held-out photographs as shards, with one image of the most common ratio damaged."""
    records = index_photographs(photographs("held_out"))
    list(write_shards(records, folder, per_shard=4, seed=0))
    most_common, _ = Counter(record.ratio for record in records).most_common(1)[0]
    broken = next(record.key for record in records if record.ratio == most_common)
    for archive in folder.glob("*.tar"):
        with tarfile.open(archive) as tar:
            offsets = [m.offset_data for m in tar.getmembers() if m.name.startswith(f"{broken}.")]
        content = bytearray(archive.read_bytes())
        for offset in offsets[:1]:
            content[offset : offset + 64] = bytes(64)
        archive.write_bytes(content)
    return folder


def test_resumed_run_from_shards_ends_as_an_uninterrupted_one(tmp_path):
    outputs = run_ranks(WORKER, 2, write_set(tmp_path / "shards"), tmp_path)

    timings = {"seconds", "data_seconds", "loader_images_per_second"}
    straight, stopped = (
        [
            {name: value for name, value in r.items() if name not in timings}
            for r in read_metrics(tmp_path / run)
        ]
        for run in RUNS
    )
    assert stopped == straight
    assert len(straight) == 9
    assert straight[-1]["skipped_samples"] > 0
    assert any("is skipped: " in output for output in outputs)
    name = "model/diffusion_pytorch_model.safetensors"
    weights, others = (load_file(tmp_path / run / name) for run in RUNS)
    assert weights.keys() == others.keys()
    for key, value in weights.items():
        assert torch.equal(others[key], value), key
