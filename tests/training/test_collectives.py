"""Collectives of our own code: two reductions per step, which also stop both ranks together.

One launch of two ranks trains both tasks: the tokenizer with its GAN, adaptive weight, R1 and LeCam.
"""

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

from benchmarks.gate import expected
from benchmarks.shared.random_latents import write_latents
from cat_fast.training.checkpoints.store import CheckpointStore
from cat_fast.training.metrics.run_log import read_metrics
from cat_fast.training.runtime.ranks import Ranks
from tests.training.rank_processes import run_ranks
from tests.training.runs import GENERATOR, TOKENIZER

KINDS = ("generator", "tokenizer")
STEPS = 5
STOP_STEP = 2
"""The step in which rank 1 gets a stop signal, or cannot read its batch."""
FAMILIES = ("all_", "barrier", "broadcast", "gather", "monitored", "recv", "reduce", "scatter", "send")
COLLECTIVES = [
    name
    for name, found in vars(torch.distributed).items()
    if name.startswith(FAMILIES) and type(found) is FunctionType
]
TIMING_METRICS = (
    "seconds", "data_seconds", "loader_images_per_second", "slowest_rank", "slowest_rank_over_median",
)  # fmt: skip
"""Metrics that are measured and differ from run to run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collectives")
    write_latents(folder / "latents")
    run_ranks("tests.training.test_collectives:train_on_rank", 2, folder)
    return folder


def reports(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{kind}_{rank}.json").read_text()) for rank in (0, 1)]


def losses(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k not in TIMING_METRICS} for record in read_metrics(run)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_a_checkpoint_has_the_expected_collectives_of_ours(folder, kind):
    count = int(expected.read()["figures"][f"collectives.{kind}"])
    for report in reports(folder, kind):
        last = report["collectives"].pop(str(STEPS - 1))
        assert len(last) > 2  # those of the checkpoint, which shows that collectives are counted
        assert report["collectives"] == {str(step): ["all_reduce"] * count for step in range(STEPS - 1)}


def test_the_tokenizer_trains_with_all_of_its_gan(folder):
    names = {name for record in read_metrics(folder / "tokenizer_uninterrupted") for name in record}
    assert {"gan", "discriminator_accuracy", "r1", "lecam", "slowest_rank"} <= names


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_request_of_one_rank_after_the_second_reduction_stops_both_before_the_next_step(folder, kind):
    for report in reports(folder, kind):
        assert report["stopped"] == ["SIGUSR1", STOP_STEP + 1]
        assert report["saved"] == STOP_STEP + 1
    # The batches drawn by then are drawn again, and no step's metrics are lost.
    assert losses(folder / f"{kind}_stopped") == losses(folder / f"{kind}_uninterrupted")


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_one_rank_cannot_read_ends_both_in_the_same_step(folder, kind):
    for report in reports(folder, kind):
        assert report["failed"] == "image 7 is gone (on rank 1)"
    assert losses(folder / f"{kind}_failed") == losses(folder / f"{kind}_uninterrupted")[:STOP_STEP]


def train_on_rank(folder: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # hundreds, from DeepSpeed's use of torch
    from cat_fast.training.runtime.ranks import start, stop

    ranks = start()
    for kind in KINDS:
        report = _train(kind, Path(folder), ranks)
        (Path(folder) / f"{kind}_{ranks.rank}.json").write_text(json.dumps(report))
    stop()


def _train(kind: str, folder: Path, ranks: Ranks) -> dict[str, Any]:
    from cat_fast.errors import UserError

    started = _counted()
    _run(kind, folder / f"{kind}_uninterrupted", ranks, _note_steps(started))
    collectives = {step: list(names) for step, names in started.items() if step >= 0}
    run = folder / f"{kind}_stopped"
    ended = _run(kind, run, ranks, _signal_rank_1(ranks))
    found = CheckpointStore(run / "checkpoints", Ranks()).latest()
    ranks.barrier()
    assert _run(kind, run, ranks) is None
    failed = ""
    try:
        _run(kind, folder / f"{kind}_failed", ranks, _fails_to_draw(ranks))
    except UserError as error:
        failed = str(error)
    return {
        "collectives": collectives,
        "stopped": [ended.reason, ended.step],
        "saved": found[0] if found else None,
        "failed": failed,
    }


def _run(kind: str, run: Path, ranks: Ranks, change: Callable[[Any], None] = lambda task: None) -> Any:
    """Run a few steps of a task, after `change` has patched the task."""
    from cat_fast.training import loop
    from cat_fast.training.config.load import load_run
    from cat_fast.training.tasks import make_task

    config, *overrides = TOKENIZER if kind == "tokenizer" else GENERATOR
    overrides += [f"output_dir={run}", f"schedule.total_steps={STEPS}", "schedule.warmup_steps=2"]
    overrides += ["checkpoint.every_steps=1000", "slow_ranks.every_steps=2"]
    if kind == "tokenizer":
        overrides += ["loss.gan_loss_starting_step=1", "loss.r1_every_steps=2"]
    else:
        overrides.append(f"data.latents={run.parent / 'latents'}")
    settings = load_run(config, overrides)
    task = make_task(settings, ranks)
    change(task)
    return loop.run(task, settings, ranks)


def _counted() -> dict[int, list[str]]:
    """Count the collectives that cat_fast calls; return their names by the last drawn step, -1 before any."""
    started: dict[int, list[str]] = {-1: []}
    for name in COLLECTIVES:
        original = getattr(torch.distributed, name)

        def counted(*given: Any, _name: str = name, _original: Any = original, **named: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"].startswith("cat_fast"):
                started[max(started)].append(_name)
            return _original(*given, **named)

        setattr(torch.distributed, name, counted)
    return started


def _note_steps(started: dict[int, list[str]]) -> Callable[[Any], None]:
    def change(task: Any) -> None:
        draw = task.draw

        def noted(step: int) -> Any:
            started[step] = []
            return draw(step)

        task.draw = noted

    return change


def _signal_rank_1(ranks: Ranks) -> Callable[[Any], None]:
    def change(task: Any) -> None:
        update = task.update

        def signalled(*given: Any) -> None:
            update(*given)
            if ranks.rank == 1 and ranks.step_context.step == STOP_STEP:
                os.kill(os.getpid(), signal.SIGUSR1)

        task.update = signalled

    return change


def _fails_to_draw(ranks: Ranks) -> Callable[[Any], None]:
    from cat_fast.errors import UserError

    def change(task: Any) -> None:
        draw = task.draw

        def failing(step: int) -> Any:
            if step == STOP_STEP and ranks.rank == 1:
                raise UserError("image 7 is gone")
            return draw(step)

        task.draw = failing

    return change
