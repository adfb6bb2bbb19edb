"""Two reductions per step are all that our own code sends: counted, and enough to end both ranks together.

One launch of two ranks trains both tasks: the tokenizer with its GAN, adaptive weight, R1 and LeCam.
"""

import inspect
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cat_fast.training.checkpoints.store import CheckpointStore
from cat_fast.training.metrics.run_log import read_metrics
from cat_fast.training.runtime.ranks import Ranks
from tests.training.runs import GENERATOR, TOKENIZER, write_latents
from tests.training.two_ranks import on_two_ranks

KINDS = ("generator", "tokenizer")
STEPS = 8
MOMENTS = ("draw", "backward", "update")
"""Where rank 1 is told to stop in its third step. In `update` the ranks have already agreed on the step."""
DONE = 3
FAMILIES = ("all_", "barrier", "broadcast", "gather", "monitored", "recv", "reduce", "scatter", "send")
COLLECTIVES = [
    name
    for name, found in vars(torch.distributed).items()
    if name.startswith(FAMILIES) and inspect.isfunction(found)
]
CLOCK = ("seconds", "data_seconds", "loader_pictures_per_second", "slowest_rank", "slowest_rank_over_median")
"""Metrics that are measured, and differ from run to run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collectives")
    write_latents(folder / "latents")
    on_two_ranks("tests.training.test_collectives:train_on_rank", folder)
    return folder


def reports(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{kind}_{rank}.json").read_text()) for rank in (0, 1)]


def losses(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in read_metrics(run)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_a_checkpoint_has_two_collectives_of_ours(folder, kind):
    for report in reports(folder, kind):
        last = report["collectives"].pop(str(STEPS - 1))
        assert len(last) > 2  # the checkpoint's show that they are counted
        assert report["collectives"] == {str(step): ["all_reduce"] * 2 for step in range(STEPS - 1)}


def test_the_tokenizer_trains_with_all_of_its_gan(folder):
    names = {name for record in read_metrics(folder / "tokenizer_straight") for name in record}
    assert {"gan", "discriminator_accuracy", "r1", "lecam", "slowest_rank"} <= names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stop_request_of_one_rank_ends_both_after_the_same_step_and_loses_nothing(folder, kind, moment):
    for report in reports(folder, kind):
        assert report["stopped"][moment] == ["SIGUSR1", DONE]
        assert report["saved"][moment] == DONE
    assert losses(folder / f"{kind}_{moment}") == losses(folder / f"{kind}_straight")


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_one_rank_cannot_read_ends_both_in_its_step(folder, kind):
    for report in reports(folder, kind):
        assert report["failed"] == "picture 7 is gone (on rank 1)"
    assert losses(folder / f"{kind}_failed") == losses(folder / f"{kind}_straight")[:2]


def train_on_rank(folder: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # torch's, of DeepSpeed's calls, by the hundred
    from cat_fast.training.runtime.ranks import start, stop

    ranks = start()
    for kind in KINDS:
        report = _train(kind, Path(folder), ranks)
        (Path(folder) / f"{kind}_{ranks.rank}.json").write_text(json.dumps(report))
    stop()


def _train(kind: str, folder: Path, ranks: Ranks) -> dict[str, Any]:
    from cat_fast.errors import UserError

    started = _counted()
    _run(kind, folder / f"{kind}_straight", ranks, _note_steps(started))
    collectives = {step: list(names) for step, names in started.items() if step >= 0}
    stopped, saved = {}, {}
    for moment in MOMENTS:
        run = folder / f"{kind}_{moment}"
        ended = _run(kind, run, ranks, _told_in(moment, ranks))
        assert ended
        stopped[moment] = [ended.reason, ended.step]
        found = CheckpointStore(run / "checkpoints", Ranks()).latest()
        saved[moment] = found[0] if found else None
        ranks.barrier()
        assert _run(kind, run, ranks) is None
    failed = ""
    try:
        _run(kind, folder / f"{kind}_failed", ranks, _fails_to_draw(ranks))
    except UserError as error:
        failed = str(error)
    return {"collectives": collectives, "stopped": stopped, "saved": saved, "failed": failed}


def _run(kind: str, run: Path, ranks: Ranks, change: Callable[[Any], None] = lambda task: None) -> Any:
    """A run of few steps, of a task with a method changed."""
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
    """Names of the collectives that code of ours calls, by the step that was drawn last; -1 before any."""
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


def _told_in(moment: str, ranks: Ranks) -> Callable[[Any], None]:
    """Rank 1 gets a signal in the third call of a method."""

    def change(task: Any) -> None:
        method, calls = getattr(task, moment), []

        def told(*given: Any) -> Any:
            calls.append(moment)
            found = method(*given)
            if len(calls) == DONE and ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return found

        setattr(task, moment, told)

    return change


def _fails_to_draw(ranks: Ranks) -> Callable[[Any], None]:
    from cat_fast.errors import UserError

    def change(task: Any) -> None:
        draw = task.draw

        def failing(step: int) -> Any:
            if step == 2 and ranks.rank == 1:
                raise UserError("picture 7 is gone")
            return draw(step)

        task.draw = failing

    return change
