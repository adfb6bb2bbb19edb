"""Estimate of the demo's duration: printed after the first steps, and consistent with the reference run."""

import json
from pathlib import Path

import pytest
from rich.progress import Progress

from cat_fast.data.folder_lock import locked
from cat_fast.demo import DemoSettings, duration, run, run_demo
from cat_fast.demo.duration import format_duration, seconds_left, seconds_per_step
from cat_fast.demo.run import Demo
from cat_fast.errors import UserError
from cat_fast.training.metrics.run_log import METRICS

REFERENCE = json.loads((Path(__file__).parents[2] / "docs/demo_metrics.json").read_text())
SIZES = {"sampling_steps": 50, "resolution": 512, "crops_per_image": 4}


def test_reference_values_are_those_of_the_committed_run():
    settings, seconds = REFERENCE["settings"], REFERENCE["seconds"]
    steps = {name: settings[f"{name}_steps"] for name in ("tokenizer", "generator", "sampling")}
    assert steps == duration.REFERENCE_STEPS
    trainings = {kind: REFERENCE[f"{kind}_training"]["seconds"] for kind in duration.KINDS}
    assert trainings == duration.REFERENCE_TRAINING
    assert {name: seconds[name] for name in duration.REFERENCE_PHASES} == duration.REFERENCE_PHASES
    assert settings["resolution"] == duration.REFERENCE_RESOLUTION
    assert settings["crops_per_image"] == duration.REFERENCE_CROPS


@pytest.mark.parametrize("slower", [1, 2])
def test_estimate_is_that_of_the_reference_run_at_its_speed_and_in_proportion(slower):
    tokenizer, generator = (duration._per_step(kind) * slower for kind in duration.KINDS)
    seconds = REFERENCE["seconds"]
    whole = seconds_left("tokenizer", tokenizer, {"tokenizer": 400, "generator": 900}, **SIZES)
    starting = sum(seconds[f"train_{k}"] - REFERENCE[f"{k}_training"]["seconds"] for k in duration.KINDS)
    assert whole == pytest.approx(slower * (sum(seconds.values()) - starting), rel=0.05)
    half = seconds_left("generator", generator, {"generator": 450}, **SIZES)
    assert half == pytest.approx(slower * (621.2 / 2 + seconds["reconstruct"] + seconds["sample"]))


def test_steps_are_measured_after_a_warm_up_from_the_first_step_of_this_run():
    records = [{"step": step, "seconds": 100.0} for step in range(5)]
    records += [{"step": step, "seconds": 50.0} for step in (5, 6)]
    assert seconds_per_step(records, 5) is None
    records += [{"step": 7 + step, "seconds": 1.0 + step} for step in range(20)]
    assert seconds_per_step(records[:14], 5) is None
    assert seconds_per_step(records, 5) == 4.5


def test_a_duration_is_in_minutes_or_seconds():
    assert [format_duration(s) for s in (59.6, 119, 1349.9)] == ["60 seconds", "119 seconds", "22 minutes"]


def test_the_demo_prints_the_time_it_will_take_once(tmp_path, monkeypatch, capfd):
    def launch(config, overrides, *, run_folder, on_step, **_):
        run_folder.mkdir(parents=True)
        for step in range(12):
            record = {"step": step, "seconds": 0.7, "loss": 1.0}
            with (run_folder / METRICS).open("a") as file:
                file.write(json.dumps(record) + "\n")
            on_step(step + 1, record)

    monkeypatch.setattr(run, "launch", launch)
    demo = Demo(tmp_path, DemoSettings(ranks=2), Progress(disable=True))
    demo.train("tokenizer", 400, [])
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "takes about" in line]
    assert line.startswith("the demo takes about 22 minutes more, estimated from 0.70 s per step")


@pytest.mark.parametrize(
    ("folder", "work"),
    [("", "running a demo"), ("runs/tokenizer", "training"), ("runs/generator", "training")],
)
def test_a_folder_with_a_live_demo_or_training_is_refused_with_its_process(tmp_path, folder, work):
    with locked(tmp_path / folder, work), pytest.raises(UserError, match=r"process \d+ on \S+ is ") as caught:
        run_demo(tmp_path, DemoSettings.quick(1))
    assert work in str(caught.value)
    assert not (tmp_path / "settings.json").exists()
