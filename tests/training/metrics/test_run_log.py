"""The log of a run has one record per step, also after a kill and resuming."""

import io
import json
import re
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cat_fast import console
from cat_fast.training.config.settings import LoggingConfig, RunConfig, ScheduleConfig
from cat_fast.training.metrics import run_log
from cat_fast.training.metrics.run_log import METRICS, RunLog, last_metrics, read_metrics, report
from cat_fast.training.runtime.ranks import Ranks


def settings(folder, total: int = 10, **logging: Any) -> RunConfig:
    return RunConfig(
        task="tokenizer",
        output_dir=str(folder),
        schedule=ScheduleConfig(total_steps=total),
        logging=LoggingConfig(**logging),
    )


def write(folder, first: int, last: int, total: int = 10, **changes: float) -> None:
    with RunLog(settings(folder, total), first) as log:
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


def test_records_can_be_read_during_the_run(tmp_path):
    with RunLog(settings(tmp_path, 2), 0) as log:
        log.step(0, {"loss": 1.0})
        assert [r["step"] for r in read_metrics(tmp_path)] == [0]


def test_a_run_without_records_has_none(tmp_path):
    assert read_metrics(tmp_path / "nowhere") == []


def test_resumed_run_logs_each_step_once(tmp_path):
    write(tmp_path, 0, 6, attempt=1)
    write(tmp_path, 4, 8, attempt=2)
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == list(range(8))
    assert [r["attempt"] for r in records] == [1] * 4 + [2] * 4


def test_tensorboard_has_each_step_once(tmp_path):
    write(tmp_path, 0, 6)
    write(tmp_path, 4, 8)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss/total")
    assert [e.step for e in events] == list(range(8))
    assert [e.value for e in events] == pytest.approx([1 / (step + 1) for step in range(8)])


@pytest.mark.parametrize("cut", ['{"st', '{"step": 3, "seconds": 0.1, "loss": 0.', "\x00\x00\x00"])
def test_truncated_last_line_is_ignored_and_dropped_on_resume(tmp_path, cut):
    write(tmp_path, 0, 3)
    with (tmp_path / METRICS).open("a") as file:
        file.write(cut)
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2]
    write(tmp_path, 3, 5)
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    assert len((tmp_path / METRICS).read_text().splitlines()) == 5


def scalars(folder, tag: str) -> list[int]:
    return [e.step for e in EventAccumulator(str(folder / "tensorboard")).Reload().Scalars(tag)]


def test_trackers_log_every_few_steps_and_json_lines_every_step(tmp_path):
    with RunLog(settings(tmp_path, scalars_every_steps=3), 0) as log:
        for step in range(8):
            log.step(step, {"loss": 1.0, "images": 4.0})
    assert scalars(tmp_path, "loss/total") == [0, 3, 6]
    assert scalars(tmp_path, "throughput/images_per_second") == [0, 3, 6]
    assert len(read_metrics(tmp_path)) == 8


def lines(folder, capsys, clock, seconds: float, monkeypatch, **logging) -> list[str]:
    """Return the lines that a run of seven steps prints without a terminal, at `seconds` per step."""
    now = iter(n * seconds for n in range(9))
    monkeypatch.setattr(clock, lambda: next(now))
    with RunLog(settings(folder, 7, **logging), 0, peak_flops=4e12) as log:
        for step in range(7):
            log.step(step, {"loss": 0.5, "images": 8.0, "tokens": 512.0, "flops": 6e12})
    return capsys.readouterr().err.splitlines()


CLOCK = "cat_fast.training.metrics.run_log.time.perf_counter"


def test_without_a_terminal_lines_are_printed_every_few_steps_and_at_the_end(tmp_path, capsys, monkeypatch):
    assert lines(tmp_path, capsys, CLOCK, 2.0, monkeypatch, every_steps=3, every_seconds=1e9) == [
        "step 3 of 7: loss 0.5, 4 images/s, 256 tokens/s, 3 TFLOP/s, MFU 75.0%, 0:00:08 left",
        "step 6 of 7: loss 0.5, 4 images/s, 256 tokens/s, 3 TFLOP/s, MFU 75.0%, 0:00:02 left",
        "step 7 of 7: loss 0.5, 4 images/s, 256 tokens/s, 3 TFLOP/s, MFU 75.0%, 0:00:00 left",
    ]


def test_slow_steps_are_logged_after_a_time_limit(tmp_path, capsys, monkeypatch):
    printed = lines(tmp_path, capsys, CLOCK, 40.0, monkeypatch, every_steps=1000, every_seconds=60)
    assert [line.split(":")[0] for line in printed] == [f"step {n} of 7" for n in (2, 4, 6, 7)]


def test_terminal_shows_a_bar_instead_of_lines(tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        console, "err", Console(file=screen, force_terminal=True, width=160, color_system=None)
    )
    with RunLog(settings(tmp_path, 4, every_steps=1), 0) as log:
        for step in range(4):
            log.step(step, {"loss": 0.25, "images": 8.0})
        log.progress.refresh()
    shown = screen.getvalue()
    assert "4/4" in shown
    assert re.search(r"loss 0\.25, [\d.,]+ images/s", shown)
    assert "step 1 of 4" not in shown


def test_grids_are_saved_and_their_metrics_logged(tmp_path):
    with RunLog(settings(tmp_path, 6, grid_every_steps=2), 0) as log:
        due = [step for step in range(6) if log.config.grid_is_due(step)]
        for step in due:
            log.grid(step, Image.new("RGB", (5, 4), (step * 40, 0, 0)), {"held_out/psnr_8x": 20.0 + step})
    assert due == [1, 3, 5]
    names = ["step_00000002.png", "step_00000004.png", "step_00000006.png"]
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == names
    assert Image.open(tmp_path / "grids" / names[2]).getpixel((0, 0)) == (200, 0, 0)
    assert scalars(tmp_path, "held_out/psnr_8x") == [1, 3, 5]


def test_grids_are_disabled_by_default(tmp_path):
    logging = settings(tmp_path).logging
    assert not any(logging.grid_is_due(step) for step in range(100))


def test_complete_run_is_summarized_in_a_line_and_a_file(tmp_path, capsys):
    write(tmp_path, 0, 3, images=2.0, tokens=10.0)
    write(tmp_path, 2, 5, images=2.0, tokens=10.0)  # resumed: step 2 counts once
    capsys.readouterr()
    report(settings(tmp_path), Ranks())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["images"], summary["tokens"], summary["ranks"]) == (5, 10, 50, 1)
    assert summary["hours"] == pytest.approx(sum(r["seconds"] for r in read_metrics(tmp_path)) / 3600)
    assert summary["peak_bytes"] > 10 * 2**20
    line = capsys.readouterr().out
    assert line.startswith("5 steps in 0:00:0")
    assert "10 images, 50 tokens" in line


def test_the_last_record_is_found_wherever_a_killed_run_cut_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "_WINDOW", 16)  # less than a record
    assert last_metrics(tmp_path) is None
    write(tmp_path, 0, 4, long=1 / 3)
    content = (tmp_path / METRICS).read_bytes()
    for size in range(len(content) + 1):
        (tmp_path / METRICS).write_bytes(content[:size])
        assert last_metrics(tmp_path) == (read_metrics(tmp_path) or [None])[-1]
    assert last_metrics(tmp_path)["step"] == 3


def test_the_last_record_is_found_without_the_others(tmp_path, monkeypatch):
    write(tmp_path, 0, 10)
    lines, loads = [], json.loads
    monkeypatch.setattr(run_log.json, "loads", lambda line: lines.append(line) or loads(line))
    assert last_metrics(tmp_path)["step"] == 9
    assert [line for line in lines if line] == (tmp_path / METRICS).read_bytes().splitlines()[-1:]
