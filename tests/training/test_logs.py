"""The log of a run: one record a step, each step once, whatever a kill left behind."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cat_fast.training.logs import METRICS, RunLog, read_metrics


def write(folder, first: int, last: int, total: int = 10, **changes: float) -> None:
    with RunLog(folder, "tokenizer", first, total) as log:
        for step in range(first, last):
            log.step(step, {"loss": 1 / (step + 1), **changes})


def test_each_step_is_one_record_with_its_metrics_and_duration(tmp_path):
    write(tmp_path, 0, 3, kl=2.5)
    records = read_metrics(tmp_path)
    assert [(r["step"], r["loss"], r["kl"]) for r in records] == [
        (0, 1.0, 2.5),
        (1, 0.5, 2.5),
        (2, 1 / 3, 2.5),
    ]
    assert all(r["seconds"] >= 0 for r in records)


def test_records_can_be_read_while_the_run_goes_on(tmp_path):
    with RunLog(tmp_path, "tokenizer", 0, 2) as log:
        log.step(0, {"loss": 1.0})
        assert [r["step"] for r in read_metrics(tmp_path)] == [0]


def test_a_run_without_records_has_none(tmp_path):
    assert read_metrics(tmp_path / "nowhere") == []


def test_a_resumed_run_tells_no_step_twice(tmp_path):
    write(tmp_path, 0, 6, attempt=1)
    write(tmp_path, 4, 8, attempt=2)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == list(range(8))
    assert [r["attempt"] for r in records] == [1] * 4 + [2] * 4


def test_tensorboard_shows_each_step_once_too(tmp_path):
    write(tmp_path, 0, 6)
    write(tmp_path, 4, 8)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [e.step for e in events] == list(range(8))
    assert [e.value for e in events] == pytest.approx([1 / (step + 1) for step in range(8)])


@pytest.mark.parametrize("cut", ['{"st', '{"step": 3, "seconds": 0.1, "loss": 0.', "\x00\x00\x00"])
def test_a_last_line_that_a_kill_cut_off_is_ignored_and_gone_after_resuming(tmp_path, cut):
    write(tmp_path, 0, 3)
    with (tmp_path / METRICS).open("a") as file:
        file.write(cut)
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2]
    write(tmp_path, 3, 5)
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    assert len((tmp_path / METRICS).read_text().splitlines()) == 5
