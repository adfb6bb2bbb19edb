"""Training loop on a task with one number as its state: checkpoints, resume, logging, and failures."""

import errno
import json
import math
import os
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.kernels.linear import op as linear_op
from cat_fast.kernels.linear.op import selected
from cat_fast.training.checkpoints.store import CheckpointStore
from cat_fast.training.config.settings import (
    CheckpointConfig,
    EvaluationConfig,
    RunConfig,
    ScheduleConfig,
)
from cat_fast.training.health.nan_guard import SKIPPED
from cat_fast.training.health.run_status import find_runs, summarize
from cat_fast.training.health.watchdog import Watchdog
from cat_fast.training.loop import EXPORT, Preempted, run
from cat_fast.training.metrics.evaluation_log import read_evaluations
from cat_fast.training.metrics.held_out_evaluation import SECONDS
from cat_fast.training.metrics.run_log import RunLog, read_metrics
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.step import Backward
from tests.kernels.onednn import needs_onednn
from tests.training.rank_processes import gloo_ranks, run_ranks
from tests.training.steps import PlainTask


class Counter(PlainTask):
    """Implementation of `loop.Task` whose entire state is the sum of its step numbers."""

    def __init__(self, fail_at: int = -1, loss_at: dict[int, float] | None = None) -> None:
        self.total = 0
        self.steps: list[int] = []
        self.fail_at = fail_at
        self.loss_at = loss_at or {}
        self.closed = False

    def train_step(self, step: int) -> dict[str, float]:
        if step == self.fail_at:
            raise KeyboardInterrupt
        self.steps.append(step)
        return {"loss": self.loss_at.get(step, 1.0)}

    def update(self, backward: Backward, sums: torch.Tensor) -> None:
        self.total += self.steps[-1]

    def save(self, folder: Path) -> None:
        (folder / "total").write_text(str(self.total))

    def load(self, folder: Path) -> None:
        self.total = int((folder / "total").read_text())

    def export(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "total").write_text(str(self.total))

    def close(self) -> None:
        self.closed = True


def settings(folder: Path, total: int = 10, every: int = 3, keep: int = 9, resume: str = "auto") -> RunConfig:
    return RunConfig(
        task="counter",
        output_dir=str(folder),
        schedule=ScheduleConfig(total_steps=total),
        checkpoint=CheckpointConfig(every_steps=every, keep_last=keep, resume=resume),
    )


def saved(folder: Path) -> list[int]:
    return [int(p.name.removeprefix("step_")) for p in sorted((folder / "checkpoints").glob("step_*"))]


def exported(folder: Path) -> int:
    return int((folder / EXPORT / "total").read_text())


def test_a_run_does_every_step_saves_on_schedule_and_at_the_end_and_exports(tmp_path):
    task = Counter()
    run(task, settings(tmp_path), Ranks())
    assert task.steps == list(range(10))
    assert saved(tmp_path) == [3, 6, 9, 10]
    assert exported(tmp_path) == sum(range(10))
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(10))


@pytest.mark.parametrize("fail_at", [-1, 4])
def test_the_task_is_closed_after_success_and_failure(tmp_path, fail_at):
    task = Counter(fail_at)
    with pytest.raises(KeyboardInterrupt) if fail_at >= 0 else nullcontext():
        run(task, settings(tmp_path), Ranks())
    assert task.closed


def test_a_last_step_that_is_on_schedule_is_saved_once(tmp_path):
    run(Counter(), settings(tmp_path, total=6), Ranks())
    assert saved(tmp_path) == [3, 6]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run(Counter(), settings(tmp_path, keep=2), Ranks())
    assert saved(tmp_path) == [9, 10]


def test_an_interrupted_run_resumes_from_its_last_checkpoint(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        run(Counter(fail_at=8), settings(tmp_path), Ranks())
    assert saved(tmp_path) == [3, 6]
    assert not (tmp_path / EXPORT).exists()
    task = Counter()
    run(task, settings(tmp_path), Ranks())
    assert task.steps == [6, 7, 8, 9]
    assert exported(tmp_path) == sum(range(10))
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(10))
    assert "step_00000006 at step 6 of 10" in capsys.readouterr().out


class Products(Counter):
    """Records the library of matrix products during its steps."""

    def train_step(self, step: int) -> dict[str, float]:
        self.backend = selected()
        return super().train_step(step)


@needs_onednn
def test_a_resumed_run_keeps_the_library_of_matrix_products(tmp_path, monkeypatch):
    def train(setting: str, faster: str, total: int) -> str:
        monkeypatch.setattr(linear_op, "calibrate", lambda: faster)
        task, config = Products(), settings(tmp_path, total=total)
        config.linear_backend = setting
        run(task, config, Ranks())
        return task.backend

    assert train("auto", faster="onednn", total=3) == "onednn"
    assert selected() == "mkl"
    record = json.loads((tmp_path / "checkpoints/step_00000003/linear_backend.json").read_text())
    assert record == {"setting": "auto", "backend": "onednn"}
    assert json.loads((tmp_path / "linear_backend.json").read_text()) == record
    assert train("auto", faster="mkl", total=6) == "onednn"
    with pytest.raises(UserError, match=r"linear_backend: expected 'onednn' or 'auto', .* got 'mkl'"):
        train("mkl", faster="mkl", total=9)


def test_resume_never_starts_over_and_keeps_the_earlier_run(tmp_path, capsys):
    run(Counter(), settings(tmp_path, total=4), Ranks())
    (tmp_path / "grids").mkdir()
    (tmp_path / "wandb_id").write_text("of the first")
    for number in (1, 2):
        task = Counter(fail_at=2)
        with pytest.raises(KeyboardInterrupt):
            run(task, settings(tmp_path, total=4, every=1, resume="never"), Ranks())
        assert task.steps == [0, 1]
        assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1]
        assert saved(tmp_path) == [1, 2]
        assert f"was moved to {tmp_path / f'earlier_{number}'}" in capsys.readouterr().out
    first, second = tmp_path / "earlier_1", tmp_path / "earlier_2"
    assert saved(first) == [3, 4]
    for name in ("grids", "wandb_id", "summary.json", "tensorboard"):
        assert (first / name).exists()
        assert name == "tensorboard" or not (tmp_path / name).exists(), "a failed run writes none"
    assert [r["step"] for r in read_metrics(first)] == [0, 1, 2, 3]
    assert saved(second) == [1, 2]
    assert len(find_runs(tmp_path)) == 1


def test_resume_never_moves_nothing_in_a_new_folder(tmp_path):
    run(Counter(), settings(tmp_path, total=4, resume="never"), Ranks())
    assert not list(tmp_path.glob("earlier_*"))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_stops_the_run_and_keeps_its_checkpoints(tmp_path, loss):
    with pytest.raises(UserError, match=r"step 7: loss not finite.*optimizer\.lr"):
        run(Counter(loss_at={7: loss}), settings(tmp_path), Ranks())
    store = CheckpointStore(tmp_path / "checkpoints", Ranks())
    assert store.latest() == (6, tmp_path / "checkpoints" / "step_00000006")
    assert not (tmp_path / EXPORT).exists()
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(7))


def test_a_finished_run_exports_again_without_training(tmp_path):
    run(Counter(), settings(tmp_path), Ranks())
    (tmp_path / EXPORT / "total").unlink()
    task = Counter()
    run(task, settings(tmp_path), Ranks())
    assert task.steps == []
    assert exported(tmp_path) == sum(range(10))


def test_a_longer_schedule_continues_a_finished_run(tmp_path):
    run(Counter(), settings(tmp_path, total=4), Ranks())
    task = Counter()
    run(task, settings(tmp_path, total=6), Ranks())
    assert task.steps == [4, 5]
    assert exported(tmp_path) == sum(range(6))


def test_an_export_replaces_the_old_one_completely(tmp_path):
    run(Counter(), settings(tmp_path), Ranks())
    (tmp_path / EXPORT / "of_an_older_run").touch()
    half = tmp_path / f".{EXPORT}.part"
    half.mkdir()
    (half / "half").touch()
    run(Counter(), settings(tmp_path), Ranks())
    assert [p.name for p in (tmp_path / EXPORT).iterdir()] == ["total"]
    assert not half.exists()


def test_an_export_that_fails_leaves_the_old_one(tmp_path):
    class FullDisk(Counter):
        def export(self, folder: Path) -> None:
            super().export(folder)
            raise OSError("no space left on device")

    run(Counter(), settings(tmp_path), Ranks())
    with pytest.raises(UserError, match=r"model: the model cannot be written \(no space"):
        run(FullDisk(), settings(tmp_path), Ranks())
    assert exported(tmp_path) == sum(range(10))


def test_two_runs_cannot_write_to_one_folder(tmp_path):
    class Meddler(Counter):
        def train_step(self, step: int) -> dict[str, float]:
            with pytest.raises(UserError, match=rf"process {os.getpid()} on .* is training here"):
                run(Counter(), settings(tmp_path), Ranks())
            return super().train_step(step)

    run(Meddler(), settings(tmp_path, total=2), Ranks())
    assert exported(tmp_path) == 1
    # The lock is released at the end of the run, although its file stays.
    run(Counter(), settings(tmp_path, total=2), Ranks())


class StoppedInStep3(Counter):
    """A task that gets SIGTERM during its fourth step."""

    def train_step(self, step: int) -> dict[str, float]:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().train_step(step)


def test_a_stopped_run_saves_after_its_step_and_resumes_from_there(tmp_path, capsys):
    stopped = StoppedInStep3()
    preempted = run(stopped, settings(tmp_path, every=100), Ranks(), command="train it")
    assert preempted == Preempted("SIGTERM", 4)
    assert stopped.steps == [0, 1, 2, 3]
    assert saved(tmp_path) == [4]
    assert not (tmp_path / EXPORT).exists()
    assert capsys.readouterr().out == (
        "preempted (SIGTERM) after step 4 of 10: checkpoint saved; resume with: train it\n"
    )
    state = summarize(tmp_path)
    assert state
    assert (state.state, state.reason, state.step, state.loss) == ("preempted", "SIGTERM", 4, 1.0)
    assert state.checkpoint.endswith("step_00000004")
    assert state.resume == f"cd {os.getcwd()} && train it"
    task = Counter()
    assert run(task, settings(tmp_path, every=100), Ranks()) is None
    assert task.steps == [4, 5, 6, 7, 8, 9]
    assert summarize(tmp_path).state == "finished"


class StoppedAfterStep3(Counter):
    """A task that gets SIGTERM in its fourth step after the second reduction."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[int] = []
        self.saves = 0

    def draw(self, step: int) -> Sequence[float]:
        self.drawn.append(step)
        return ()

    def undraw(self) -> None:
        self.drawn.pop()

    def update(self, backward: Backward, sums: torch.Tensor) -> None:
        super().update(backward, sums)
        if self.steps[-1] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.saves += 1


@pytest.mark.parametrize("every", [100, 4])
def test_a_stop_after_the_second_reduction_ends_the_run_before_the_next_step_and_saves_once(tmp_path, every):
    stopped = StoppedAfterStep3()
    assert run(stopped, settings(tmp_path, every=every), Ranks()) == Preempted("SIGTERM", 4)
    assert stopped.steps == stopped.drawn == [0, 1, 2, 3]
    assert stopped.saves == 1
    assert saved(tmp_path) == [4]
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3]
    task = Counter()
    assert run(task, settings(tmp_path, every=100), Ranks()) is None
    assert task.steps == [4, 5, 6, 7, 8, 9]
    assert exported(tmp_path) == sum(range(10))


def test_a_step_is_logged_during_the_next_one_and_before_a_checkpoint(tmp_path):
    class Reads(Counter):
        def train_step(self, step: int) -> dict[str, float]:
            assert len(read_metrics(tmp_path)) == max(0, step - (step % 3 > 0))
            return super().train_step(step) | {"own": float(step)}

        def update(self, backward: Backward, sums: torch.Tensor) -> None:
            assert len(read_metrics(tmp_path)) == self.steps[-1]
            super().update(backward, sums)

        def save(self, folder: Path) -> None:
            assert len(read_metrics(tmp_path)) == self.steps[-1] + 1
            super().save(folder)

    run(Reads(), settings(tmp_path), Ranks())
    assert [(r["step"], r["own"]) for r in read_metrics(tmp_path)] == [(n, n) for n in range(10)]


def test_a_step_that_cannot_be_logged_ends_the_run_before_the_next_one_changes_anything(
    tmp_path, monkeypatch
):
    log_step = RunLog.step

    def full(self: RunLog, step: int, *arguments: Any) -> None:
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        log_step(self, step, *arguments)

    monkeypatch.setattr(RunLog, "step", full)
    task = Counter()
    with pytest.raises(UserError, match=r"the log cannot be written \(the disk is full\)"):
        run(task, settings(tmp_path), Ranks())
    assert task.total == sum(range(5))
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_a_run_that_is_stopped_in_its_last_step_finishes(tmp_path):
    assert run(StoppedInStep3(), settings(tmp_path, total=4), Ranks()) is None
    assert exported(tmp_path) == 6


def test_a_skipped_step_is_counted_and_logged_without_non_finite_metrics(tmp_path):
    class Skips(Counter):
        def train_step(self, step: int) -> dict[str, float]:
            metrics = super().train_step(step)
            return {"loss": math.nan, "kl": 2.0, SKIPPED: 1.0} if step in (2, 5) else metrics

    run(Skips(), settings(tmp_path), Ranks())
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records if SKIPPED in r] == [2, 5]
    assert all(("loss" in r) == (r["step"] not in (2, 5)) for r in records)
    assert records[2]["kl"] == 2.0
    assert summarize(tmp_path).skipped == 2


def test_a_resumed_run_counts_earlier_skipped_steps(tmp_path):
    class Skips(Counter):
        def train_step(self, step: int) -> dict[str, float]:
            metrics = super().train_step(step)
            return {"loss": math.nan, SKIPPED: 1.0} if step in (2, 5, 7) else metrics

    with pytest.raises(KeyboardInterrupt):
        run(Skips(fail_at=8), settings(tmp_path), Ranks())  # saved after 6 steps
    run(Skips(), settings(tmp_path), Ranks())
    assert summarize(tmp_path).skipped == 3


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("the data is gone"), "the data is gone"),
        (RuntimeError("first\nsecond"), "RuntimeError: first"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_a_failed_run_records_its_reason(tmp_path, error, reason):
    class Fails(Counter):
        def train_step(self, step: int) -> dict[str, float]:
            if step == 7:
                raise error
            return super().train_step(step)

    with pytest.raises(type(error)):
        run(Fails(), settings(tmp_path), Ranks(), command="train it")
    state = summarize(tmp_path)
    assert state
    assert (state.state, state.reason, state.step) == ("failed", reason, 7)
    assert state.checkpoint.endswith("step_00000006")
    assert state.resume.endswith("train it")


def test_a_full_disk_while_saving_raises_one_error_and_keeps_the_last_checkpoint(tmp_path):
    class FullDisk(Counter):
        def save(self, folder: Path) -> None:
            super().save(folder)
            if self.steps[-1] == 8:
                raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"checkpoints: a checkpoint cannot be written \(the disk is full\)"):
        run(FullDisk(), settings(tmp_path), Ranks())
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == ["step_00000003", "step_00000006"]
    task = Counter()
    run(task, settings(tmp_path), Ranks())
    assert task.steps == [6, 7, 8, 9]


class Evaluated(Counter):
    """A task that is evaluated; the evaluation after each step of `errors` raises."""

    def __init__(self, errors: dict[int, Exception]) -> None:
        super().__init__()
        self.errors = errors

    def evaluate(self) -> dict[str, float]:
        if error := self.errors.get(self.steps[-1]):
            raise error
        return {SECONDS: 0.0, "held_out/psnr_8x": 20.0}


def evaluated(folder: Path, **changes: int) -> RunConfig:
    config = settings(folder, **changes)
    config.evaluation = EvaluationConfig(every_steps=config.checkpoint.every_steps)
    return config


def test_a_failed_evaluation_leaves_the_checkpoint_of_its_step(tmp_path):
    with pytest.raises(RuntimeError, match="no kernel image"):
        run(Evaluated({2: RuntimeError("no kernel image")}), evaluated(tmp_path), Ranks())
    assert saved(tmp_path) == [3]
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2]
    task = Evaluated({})
    run(task, evaluated(tmp_path), Ranks())
    assert task.steps == list(range(3, 10))
    assert [r["step"] for r in read_evaluations(tmp_path)] == [5, 8]


def test_batches_of_an_evaluation_are_progress_to_the_watchdog(tmp_path, monkeypatch):
    ranks, phases = Ranks(), []

    class Reports(Evaluated):
        def evaluate(self) -> dict[str, float]:
            ranks.step_context.report_progress()
            phases.append("batch")
            return super().evaluate()

    monkeypatch.setattr(Watchdog, "progress", lambda watchdog, phase: phases.append(phase))
    run(Reports({}), evaluated(tmp_path, total=3), ranks)
    before = phases[: phases.index("batch")]
    assert before[-3:] == ["saving a checkpoint", *["drawing a grid or evaluating"] * 2]


@pytest.mark.parametrize("total", [6, 10])
def test_an_evaluation_that_cannot_be_written_ends_the_run_before_the_next_step(tmp_path, total):
    task = Evaluated({5: OSError(errno.ENOSPC, "No space left on device")})
    with pytest.raises(UserError, match=r"the log cannot be written \(the disk is full\)"):
        run(task, evaluated(tmp_path, total=total), Ranks())
    assert task.steps == list(range(6))
    assert saved(tmp_path) == [3, 6]


def test_a_checkpoint_that_cannot_be_sealed_ends_the_run_within_steps(tmp_path, monkeypatch):
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run(Counter(), settings(tmp_path, total=3), Ranks())
    monkeypatch.setattr("cat_fast.training.checkpoints.store.seal", full)
    task = Counter()
    with pytest.raises(UserError, match="the disk is full"):
        run(task, settings(tmp_path, total=1000, every=500), Ranks())
    assert max(task.steps) < 999
    assert saved(tmp_path) == [3]
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("place", ["/proc/cat_fast", "/sys/cat_fast", "file/run"])
def test_a_folder_that_is_not_writable_raises_one_error(tmp_path, monkeypatch, place):
    """Use folders that even root cannot write: in the kernel's file systems, or below a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"output_dir: {place}: not writable"):
        run(Counter(), settings(Path(place)), Ranks())


class OnTwoRanks(Counter):
    """A task that writes one file per rank; rank 1 gets a full disk or a signal in a given step."""

    def __init__(self, ranks: Ranks, full_at: int = -1, stopped_at: int = -1) -> None:
        super().__init__()
        self.ranks, self.full_at, self.stopped_at = ranks, full_at, stopped_at

    def train_step(self, step: int) -> dict[str, float]:
        if self.ranks.rank == 1 and step == self.stopped_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().train_step(step)

    def save(self, folder: Path) -> None:
        (folder / f"rank_{self.ranks.rank}").write_text(str(self.total))
        if self.ranks.rank == 1 and self.steps[-1] == self.full_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    def load(self, folder: Path) -> None:
        self.total = int((folder / f"rank_{self.ranks.rank}").read_text())

    def export(self, folder: Path) -> None:
        if self.ranks.is_main:
            super().export(folder)


def test_an_error_or_signal_on_one_rank_ends_both_with_one_message(tmp_path):
    outputs = run_ranks("tests.training.test_loop:on_rank", 2, tmp_path)
    for rank, output in enumerate(outputs):
        assert f"rank {rank} failed: {tmp_path}/checkpoints: a checkpoint cannot be written" in output
        assert "(on rank 1)" in output
        assert f"rank {rank} ended: Preempted(reason='SIGUSR1', step=8)" in output
    assert saved(tmp_path) == [3, 8]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert outputs[0].count("preempted (SIGUSR1) after step 8") == 1
    assert "preempted (" not in outputs[1]


def on_rank(folder: str) -> None:
    ranks = gloo_ranks()
    try:
        run(OnTwoRanks(ranks, full_at=5), settings(Path(folder), every=3), ranks)
    except UserError as error:
        print(f"rank {ranks.rank} failed: {error}")
    preempted = run(OnTwoRanks(ranks, stopped_at=7), settings(Path(folder), every=100), ranks)
    print(f"rank {ranks.rank} ended: {preempted}")


def run_in_own_folder(folder: str) -> None:
    ranks = gloo_ranks()
    run(Counter(), settings(Path(folder) / f"of_rank_{ranks.rank}"), ranks)


def test_ranks_that_do_not_share_their_folder_fail_before_training(tmp_path):
    for rank in (0, 1):
        (tmp_path / f"of_rank_{rank}").mkdir()
    outputs = run_ranks("tests.training.test_loop:run_in_own_folder", 2, tmp_path, code=1)
    for output in outputs:
        assert "every rank needs storage that all machines share (on rank 1)" in output
    assert not list(tmp_path.rglob("step_*"))
    assert not list(tmp_path.rglob(".shared_*"))
