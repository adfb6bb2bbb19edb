"""Two ranks train from shards with a broken picture: interrupted, they end where a straight run does."""

import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from cat_fast.complexity.indexing import index_photographs
from cat_fast.data.photographs import photographs
from cat_fast.data.shard_writer import write_shards
from cat_fast.training.distributed import free_port
from cat_fast.training.logs import read_metrics
from tests.training.stream_worker import RUNS

WORKER = Path(__file__).with_name("stream_worker.py")


def write_set(folder: Path) -> Path:
    """The held-out photographs; one of the commonest ratio is damaged."""
    records = index_photographs(photographs("held_out"))
    list(write_shards(records, folder, per_shard=4, seed=0))
    commonest, _ = Counter(record.ratio for record in records).most_common(1)[0]
    broken = next(record.key for record in records if record.ratio == commonest)
    for archive in folder.glob("*.tar"):
        with tarfile.open(archive) as tar:
            places = [m.offset_data for m in tar.getmembers() if m.name.startswith(f"{broken}.")]
        content = bytearray(archive.read_bytes())
        for place in places[:1]:
            content[place : place + 64] = bytes(64)
        archive.write_bytes(content)
    return folder


def test_interrupted_runs_from_shards_end_where_a_straight_one_does(tmp_path):
    shards, port = write_set(tmp_path / "shards"), free_port()
    base = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(shards), str(tmp_path)],
            env={**base, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [worker.communicate(timeout=500)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)

    timings = {"seconds", "data_seconds", "loader_pictures_per_second"}
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
