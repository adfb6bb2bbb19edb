"""The shared loop on a task of one number: when it saves, how it goes on, what it leaves when it cannot."""

import math
from pathlib import Path

import pytest

from cat_fast.errors import UserError
from cat_fast.training.checkpoint import CheckpointStore
from cat_fast.training.distributed import Ranks
from cat_fast.training.logs import read_metrics
from cat_fast.training.loop import EXPORT, run
from cat_fast.training.settings import CheckpointConfig, RunConfig, ScheduleConfig


class Counter:
    """Implements `loop.Task`: its whole state is the sum of the steps it did."""

    def __init__(self, fail_at: int = -1, loss_at: dict[int, float] | None = None) -> None:
        self.total = 0
        self.steps: list[int] = []
        self.fail_at = fail_at
        self.loss_at = loss_at or {}

    def train_step(self, step: int) -> dict[str, float]:
        if step == self.fail_at:
            raise KeyboardInterrupt
        self.steps.append(step)
        self.total += step
        return {"loss": self.loss_at.get(step, 1.0)}

    def save(self, folder: Path) -> None:
        (folder / "total").write_text(str(self.total))

    def load(self, folder: Path) -> None:
        self.total = int((folder / "total").read_text())

    def export(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "total").write_text(str(self.total))


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


def test_a_last_step_that_is_on_schedule_is_saved_once(tmp_path):
    run(Counter(), settings(tmp_path, total=6), Ranks())
    assert saved(tmp_path) == [3, 6]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run(Counter(), settings(tmp_path, keep=2), Ranks())
    assert saved(tmp_path) == [9, 10]


def test_an_interrupted_run_goes_on_from_its_last_checkpoint(tmp_path, capsys):
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


def test_a_run_told_never_to_resume_starts_over(tmp_path):
    run(Counter(), settings(tmp_path, total=4), Ranks())
    task = Counter()
    run(task, settings(tmp_path, total=4, resume="never"), Ranks())
    assert task.steps == [0, 1, 2, 3]
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(tmp_path, loss):
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


def test_an_export_replaces_the_old_one_whole(tmp_path):
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
    with pytest.raises(OSError, match="no space"):
        run(FullDisk(), settings(tmp_path), Ranks())
    assert exported(tmp_path) == sum(range(10))


def test_two_runs_cannot_write_to_one_folder(tmp_path):
    class Meddler(Counter):
        def train_step(self, step: int) -> dict[str, float]:
            with pytest.raises(UserError, match="another process is training here"):
                run(Counter(), settings(tmp_path), Ranks())
            return super().train_step(step)

    run(Meddler(), settings(tmp_path, total=2), Ranks())
    assert exported(tmp_path) == 1
    # The lock goes with the run that held it, not with its file.
    run(Counter(), settings(tmp_path, total=2), Ranks())
