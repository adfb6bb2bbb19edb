"""Trackers log metrics in groups and images, with one wandb run per folder."""

import sys
import textwrap

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cat_fast.config import fill
from cat_fast.errors import UserError
from cat_fast.training.config.settings import LoggingConfig, RunConfig
from cat_fast.training.metrics.trackers import TensorBoard, make_trackers, tags

METRICS = {
    "step": 7,
    "seconds": 0.5,
    "loss": 1.25,
    "l1": 1.0,
    "weighted/l1": 1.0,
    "discriminator": 1.4,
    "weighted/discriminator": 1.4,
    "discriminator_accuracy": 0.75,
    "loss_8x": 1.5,
    "l1_8x": 1.25,
    "weighted/l1_8x": 1.25,
    "discriminator_accuracy_32x": 0.5,
    "images": 8.0,
    "tokens": 512.0,
    "images_per_second": 16.0,
    "mfu": 0.4,
    "data_share": 2.0,
    "held_out/psnr_8x": 21.0,
}


def test_every_metric_has_a_group():
    assert tags(METRICS) == {
        "throughput/seconds": 0.5,
        "loss/total": 1.25,
        "loss/l1": 1.0,
        "weighted/l1": 1.0,
        "loss/discriminator": 1.4,
        "weighted/discriminator": 1.4,
        "training/discriminator_accuracy": 0.75,
        "per_ratio/loss_8x": 1.5,
        "per_ratio/l1_8x": 1.25,
        "per_ratio_weighted/l1_8x": 1.25,
        "per_ratio/discriminator_accuracy_32x": 0.5,
        "throughput/images": 8.0,
        "throughput/tokens": 512.0,
        "throughput/images_per_second": 16.0,
        "throughput/mfu": 0.4,
        "training/data_share": 2.0,
        "held_out/psnr_8x": 21.0,
    }


def test_tensorboard_logs_images(tmp_path):
    board = TensorBoard(tmp_path, 0)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    board.image("reconstructions", Image.fromarray(pixels), 4)
    (event,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("reconstructions")
    board.close(failed=False)
    assert (event.step, event.width, event.height) == (4, 9, 6)


FAKE_WANDB = """
    import json, os
    RUNS = []

    class Image:
        def __init__(self, image): self.size = image.size

    class Run:
        def __init__(self, given): self.given, self.logged, self.finished = given, [], False
        def log(self, values, step): self.logged.append((step, values))
        def finish(self, exit_code): self.finished, self.exit_code = True, exit_code

    class Error(Exception): pass

    ERRORS = []

    def init(**given):
        if ERRORS: raise ERRORS.pop()
        RUNS.append(Run(given))
        return RUNS[-1]
"""


def config(folder, **logging) -> RunConfig:
    return RunConfig(task="tokenizer", output_dir=str(folder), logging=LoggingConfig(**logging))


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """Fake module that records the logged values."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "wandb.py").write_text(textwrap.dedent(FAKE_WANDB))
    monkeypatch.syspath_prepend(packages)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    yield wandb
    sys.modules.pop("wandb", None)


def test_wandb_logs_if_configured_and_a_resumed_run_keeps_its_id(tmp_path, wandb):
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    for first in (0, 3):
        _, tracker = make_trackers(run, config(run, wandb_project="cat"), first)
        tracker.scalars({"loss/total": 1.0}, first)
        tracker.image("reconstructions", Image.new("RGB", (4, 2)), first)
        tracker.close(failed=first == 3)
    one, two = wandb.RUNS
    assert one.given["project"] == "cat"
    assert one.given["name"] == "mine"
    assert one.given["config"]["task"] == "tokenizer"
    assert one.given["config"]["optimizer"]["lr"] == 1e-4
    assert "mode" not in one.given  # WANDB_MODE decides
    assert one.logged[0] == (0, {"loss/total": 1.0})
    assert one.logged[1][1]["reconstructions"].size == (4, 2)
    assert one.finished
    assert two.finished
    assert (one.exit_code, two.exit_code) == (0, 1)
    assert two.given["id"] == one.given["id"]
    assert two.given["resume"] == "allow"


def test_wandb_that_fails_to_start_is_an_error_and_later_failures_are_a_warning(tmp_path, wandb, capsys):
    wandb.ERRORS.append(wandb.Error("no network"))
    with pytest.raises(UserError, match=r"wandb_project: wandb cannot be started \(no network\).*offline"):
        make_trackers(tmp_path, config(tmp_path, wandb_project="cat"), 0)
    _, tracker = make_trackers(tmp_path, config(tmp_path, wandb_project="cat"), 0)
    (run,) = wandb.RUNS
    tracker.scalars({"loss/total": 1.0}, 0)

    def broken(values, step):
        raise RuntimeError("its process died")

    run.log = broken
    for step in (1, 2):
        tracker.scalars({"loss/total": 1.0}, step)
    assert len(run.logged) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "logging to wandb stopped at step 1 (its process died)" in line


def test_each_folder_is_a_separate_wandb_run(tmp_path, wandb):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make_trackers(tmp_path / name, config(tmp_path / name, wandb_project="cat"), 0)
    one, two = wandb.RUNS
    assert one.given["id"] != two.given["id"]


def test_wandb_is_not_imported_by_default(tmp_path):
    (only,) = make_trackers(tmp_path, config(tmp_path), 0)
    only.close(failed=False)
    assert "wandb" not in sys.modules


def test_configured_but_missing_wandb_is_an_error_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    values = {"task": "tokenizer", "output_dir": "somewhere"}
    with pytest.raises(UserError, match=r"wandb is not installed: pip install 'cat-fast\[wandb\]'"):
        fill(RunConfig, values, ["logging.wandb_project=cat"])
