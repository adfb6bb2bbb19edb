"""Encoding processes: errors at start-up, threads per process, signals."""

import os
import signal
import sys
import time
from collections.abc import Callable
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from cat_fast.errors import UserError
from cat_fast.inference.encoding import latent_shards, shard_processes
from cat_fast.inference.encoding.shard_plan import EncodeShardsSettings, work_units
from cat_fast.inference.encoding.shard_processes import encode_in_processes
from tests.cli.conftest import tiny_tokenizer
from tests.processes.survivors import wait_for
from tests.training.rank_processes import RankProcess


def test_error_has_the_reason_why_a_process_could_not_start(tmp_path):
    settings = EncodeShardsSettings(source="photographs", out=tmp_path / "out", size=64)
    units, missing = work_units(0, 1, 2, 1), tmp_path / "missing"
    with pytest.raises(UserError, match=r"could not start: \S*missing: no such folder"):
        encode_in_processes(settings, missing, "cpu", ["sky"], units, 2, lambda kind, images: None)


def test_device_error_is_formatted_on_one_line():
    error = RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB. " + 9999 * "x")
    message = shard_processes._format_error(error)
    assert message.startswith("RuntimeError: CUDA out of memory. Tried to allocate 2 GiB. xxx")
    assert message.endswith("use fewer --workers")
    assert len(message) < 500


def test_processes_share_the_available_cpus(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4, 5, 6})
    assert [shard_processes._num_threads(workers) for workers in (1, 2, 3, 8)] == [4, 2, 1, 1]


STARTING, ENCODING, WRITING = "starting", "encoding", "writing"
SHARDS = 8
SECONDS = 1.0
"""Time that a worker takes for the phase in which the test signals its parent."""


def encode(source: str, out: str, phase: str) -> None:
    """Run `cat-fast encode-shards` with two forked workers, which create OUT.PID when they enter a phase."""
    from cat_fast.cli.main import main

    def slow_in(name: str, function: Callable) -> Callable:
        def slowed(*arguments, **options):
            if phase == name:
                Path(f"{out}.{os.getpid()}").touch()
                time.sleep(SECONDS)
            return function(*arguments, **options)

        return slowed

    shard_processes.get_context = lambda method: get_context("fork")
    shard_processes.load_tokenizer = slow_in(STARTING, shard_processes.load_tokenizer)
    latent_shards.encode_by_ratio = slow_in(ENCODING, latent_shards.encode_by_ratio)
    latent_shards.write_shard = slow_in(WRITING, latent_shards.write_shard)
    options = ["--size", "64", "--ratio", "16", "--per-shard", "1", "--workers", "2"]
    sys.argv = [
        "cat-fast",
        "encode-shards",
        f"{source}/images",
        "-c",
        f"{source}/tokenizer",
        "-o",
        out,
        *options,
    ]
    main()


def start(source: Path, out: Path, phase: str) -> RankProcess:
    return RankProcess(f"{__name__}:encode", [str(source), str(out), phase], dict(os.environ))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "images").mkdir()
    for number in range(SHARDS):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    return folder


CASES = list(
    product(
        (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL),
        (STARTING, ENCODING, WRITING),
    )
)


@pytest.fixture(scope="module")
def signalled(source, tmp_path_factory):
    """Signal one command per case in its phase; return exit codes, survivors, shards left, and output."""
    root = tmp_path_factory.mktemp("signalled")
    started = {}
    for kind, phase in CASES:
        out = root / f"{kind.name}-{phase}"
        started[kind, phase] = out, start(source, out, phase)
    children, found = {}, {}
    try:

        def signal_all() -> bool:
            """Signal each command that is in its phase; return True once all are signalled."""
            for (kind, phase), (out, process) in started.items():
                if (kind, phase) not in children and list(root.glob(f"{out.name}.*")):
                    children[kind, phase] = psutil.Process(process.pid).children(recursive=True)
                    process.send_signal(kind)
            return len(children) == len(started)

        assert wait_for(signal_all, 60), [process.output() for _, process in started.values()]
        for case, (out, process) in started.items():
            code = process.wait(30)
            _, survivors = psutil.wait_procs(children[case], timeout=10)
            found[case] = out, code, survivors, shards(out), process.output()
    finally:
        for _, process in started.values():
            process.close()
    return found


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*.safetensors")}


@pytest.mark.parametrize(("kind", "phase"), CASES)
def test_after_a_signal_workers_finish_their_shard_and_a_rerun_writes_the_others(
    signalled, source, kind, phase, complete
):
    out, code, survivors, left, output = signalled[kind, phase]
    assert code == (-kind if kind == signal.SIGKILL else 128 + kind), output
    assert survivors == []
    if phase == STARTING:
        assert left == {}
    else:
        assert 1 <= len(left) < SHARDS
    assert not list(out.glob(".*.part"))
    assert "Traceback" not in output
    if kind != signal.SIGKILL:
        assert f"interrupted ({kind.name}): complete shards are kept; run the same command again" in output
    if kind == signal.SIGTERM:
        again = start(source, out, "")
        try:
            assert again.wait(60) == 0, again.output()
        finally:
            again.close()
        assert shards(out) == complete


@pytest.fixture(scope="module")
def complete(source, tmp_path_factory):
    """Shards of an uninterrupted run."""
    out = tmp_path_factory.mktemp("complete") / "out"
    process = start(source, out, "")
    try:
        assert process.wait(60) == 0, process.output()
    finally:
        process.close()
    found = shards(out)
    assert len(found) == SHARDS
    return found
