"""Write errors: if one rank cannot write a checkpoint, all ranks raise one error and keep earlier ones."""

import errno
import os
import shlex
from pathlib import Path

import pytest

from benchmarks.shared.random_latents import write_latents
from cat_fast.errors import UserError
from cat_fast.training.checkpoints.store import CheckpointStore
from cat_fast.training.checkpoints.write_errors import DeferredErrorWriter
from cat_fast.training.health.run_status import summarize
from cat_fast.training.runtime.ranks import Ranks
from tests.training.rank_processes import gloo_ranks, run_ranks
from tests.training.runs import command, finish, start


class Writer:
    """Stand-in for DeepSpeed's checkpoint writer; with `fails` it raises after writing."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.committed: list[str] = []

    def create(self, info: str) -> None: ...

    def save(self, state: bytes, path: str) -> None:
        Path(path).write_bytes(state)
        if self.fails:
            raise OSError(errno.ENOSPC, "No space left on device")

    def commit(self, info: str) -> bool:
        self.committed.append(info)
        return True

    def is_decoupled(self) -> bool:
        return False


def test_a_rank_that_cannot_write_deletes_its_file_and_all_ranks_raise_at_commit(tmp_path):
    outputs = run_ranks("tests.training.checkpoints.test_write_errors:write_on_rank", 2, tmp_path)
    for rank, output in enumerate(outputs):
        assert f"rank {rank}: {tmp_path}: a checkpoint cannot be written (the disk is full)" in output
        assert f"rank {rank} afterwards: ['second']" in output
    part = tmp_path / ".step_00000001.part"
    assert sorted(p.name for p in part.iterdir()) == ["first_0", "second_0", "second_1"]


def write_on_rank(folder: str) -> None:
    ranks = gloo_ranks()
    part = Path(folder) / ".step_00000001.part"
    part.mkdir(exist_ok=True)
    inner = Writer(fails=ranks.rank == 1)
    writer = DeferredErrorWriter(inner, ranks)
    for name in ("first", "second"):
        writer.create(name)
        writer.save(b"x" * 100, str(part / f"{name}_{ranks.rank}"))
        try:
            writer.commit(name)
        except UserError as error:
            print(f"rank {ranks.rank}: {error}")
        inner.fails = False
    assert not writer.is_decoupled()
    print(f"rank {ranks.rank} afterwards: {inner.committed}")


@pytest.mark.slow
def test_a_run_on_a_full_disk_exits_with_one_error_line_and_code_2_and_keeps_its_checkpoint(tmp_path):
    """Limit the file size to 16 KiB in the second run."""
    latents = write_latents(tmp_path / "latents")
    run, log, full = tmp_path / "run", tmp_path / "log", tmp_path / "full.log"
    finish(start(command("generator", run, latents, "schedule.total_steps=2"), log), log)
    # The rehearsal would find this before the first step.
    limited = command("generator", run, latents, "schedule.total_steps=4", "rehearsal=false")
    process = start(["bash", "-c", f"ulimit -f 16; exec {shlex.join(limited)}"], full)
    assert process.wait(timeout=300) == 2, full.read_text()
    output = full.read_text()
    lines = [line for line in output.splitlines() if line.startswith("error")]
    assert len(lines) == 1, output
    assert lines[0].startswith(f"error: {run}/checkpoints: a checkpoint cannot be written (")
    assert "Traceback" not in output
    assert os.listdir(run / "checkpoints") == ["step_00000002"]
    assert CheckpointStore(run / "checkpoints", Ranks()).latest() == (
        2,
        run / "checkpoints" / "step_00000002",
    )
    state = summarize(run)
    assert state
    assert (state.state, state.step) == ("failed", 4)
    assert "a checkpoint cannot be written" in state.reason
