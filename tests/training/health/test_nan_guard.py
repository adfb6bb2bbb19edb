"""Non-finite steps change nothing on any rank; the next steps run as if they had not happened."""

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.shared.random_latents import write_latents
from cat_fast.errors import UserError
from cat_fast.training.config.settings import GuardConfig, OptimizerConfig
from cat_fast.training.health.nan_guard import SKIPPED, StepGuard
from cat_fast.training.runtime.collective_errors import SharedError
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.step_context import describe_batch
from tests.training.rank_processes import run_ranks
from tests.training.runs import GENERATOR, TOKENIZER

NAN, INF = float("nan"), float("inf")
CLEAN = (0, 2, 4, 7)
"""Finite steps of the engines below. In steps 1 and 5 the loss on rank 1 is not finite, in steps 3 and 6 the
gradient on rank 0."""
STAGES = (
    (0, 10**6, 1),
    (1, 10**6, 1),
    (2, 10**6, 1),
    (2, 50, 1),
    (3, 10**6, 1),
    (1, 50, 2),
    (2, 50, 2),
    (3, 50, 2),
)
"""ZeRO stage, bucket size and accumulation steps."""


class PlainEngine:
    """The part of an engine's interface that the guard uses, around torch's own optimiser."""

    micro_steps = 0

    def __init__(self) -> None:
        self.module = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1.0)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def gradient_accumulation_steps(self) -> int:
        return 1


def guard_at(step: int, max_bad_steps: int = 3) -> StepGuard:
    ranks = Ranks()
    ranks.step_context.begin(step)
    ranks.step_context.set_batches([describe_batch(["a.png", "b.png"], 16)])
    return StepGuard(GuardConfig(max_bad_steps=max_bad_steps), ranks)


def passes(guard: StepGuard, losses: dict[str, torch.Tensor], engines: dict[str, Any]) -> bool:
    """Inspect, reduce and decide, as a step does. Collective: every rank must call it."""
    return guard.passes(guard.ranks.sum(guard.inspect(losses, engines)).tolist())


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_non_finite_loss_does_not_pass_and_its_gradients_are_dropped(value, capsys):
    engine, guard = PlainEngine(), guard_at(7)
    engine.module(torch.ones(2)).sum().backward()
    losses = {"loss": torch.tensor(value), "l1": torch.tensor(value), "kl": torch.tensor(1.0)}
    assert not passes(guard, losses, {"model": engine})
    assert all(p.grad is None for p in engine.module.parameters())
    output = capsys.readouterr().err
    assert output.startswith(
        "step 7 skipped (1 in a row, 1 in total), not finite: l1 of rank 0 (16x, batch a.png, b.png)"
    )


@pytest.mark.parametrize("value", [NAN, INF, 1e30])
def test_a_gradient_whose_norm_overflows_float32_does_not_pass(value, capsys):
    engine, guard = PlainEngine(), guard_at(0)
    (engine.module(torch.ones(2)).sum() * value).backward()
    assert not passes(guard, {"loss": torch.tensor(1.0)}, {"model": engine})
    assert "the gradient norm of the model" in capsys.readouterr().err


def test_finite_steps_keep_their_gradients_and_reset_the_count():
    engine, guard = PlainEngine(), guard_at(0, max_bad_steps=2)
    for value in (NAN, 1.0, NAN, 1.0):
        engine.module(torch.ones(2)).sum().backward()
        assert passes(guard, {"loss": torch.tensor(value)}, {"model": engine}) == (value == 1.0)
    assert all(p.grad is not None for p in engine.module.parameters())
    assert guard.skipped == 2


def test_too_many_in_a_row_end_the_run_with_a_diagnosis():
    engine, guard = PlainEngine(), guard_at(9, max_bad_steps=2)
    losses = {"loss": torch.tensor(NAN), "weighted/kl": torch.tensor(NAN), "kl": torch.tensor(NAN)}
    assert not passes(guard, losses, {"model": engine})
    with pytest.raises(
        SharedError, match=r"2 steps in a row.*step 9.*kl of rank 0 \(16x, batch a\.png, b\.png\)"
    ):
        passes(guard, losses, {"model": engine})


def test_the_bad_batch_of_several_is_named(capsys):
    guard = guard_at(3)
    guard.ranks.step_context.set_batches(
        [describe_batch(["a.png"], 8), describe_batch(["b.png"], 16), describe_batch(["c.png"], 32)]
    )
    losses = {"l1": torch.tensor([1.0, NAN, 1.0]), "kl": torch.tensor([1.0, 1.0, INF])}
    assert not passes(guard, losses, {})
    output = capsys.readouterr().err
    assert "l1 of rank 0 (16x, batch b.png); kl of rank 0 (32x, batch c.png)" in output
    assert "a.png" not in output


def test_long_lists_of_files_are_abbreviated():
    ranks = Ranks()
    ranks.step_context.set_batches([describe_batch([f"{n}.png" for n in range(100)])])
    with pytest.raises(UserError, match=r"15\.png and 84 more"):
        passes(StepGuard(GuardConfig(max_bad_steps=1), ranks), {"loss": torch.tensor(NAN)}, {})


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The (report, output) of both ranks, for engines under every stage, then both tasks."""
    folder = tmp_path_factory.mktemp("guard")
    latents = write_latents(folder / "latents")
    outputs = run_ranks("tests.training.health.test_nan_guard:skip_on_rank", 2, folder, latents)
    reports = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    return list(zip(reports, outputs, strict=True))


def skip_on_rank(folder: str, latents: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # hundreds, from DeepSpeed's use of torch
    from cat_fast.training.runtime.ranks import start, stop

    ranks = start()
    report = {"stages": _stages(ranks)} | {
        kind: _task(kind, latents, folder, ranks) for kind in ("generator", "tokenizer")
    }
    (Path(folder) / f"rank_{ranks.rank}.json").write_text(json.dumps(report))
    stop()


def test_a_run_with_bad_steps_equals_one_without_them_under_every_stage(two_ranks):
    for report, output in two_ranks:
        assert report["stages"]["equal"] == {"/".join(map(str, case)): True for case in STAGES}, output
        assert report["stages"]["skipped"] == [4] * len(STAGES)
        for (stage, *_), norms in zip(STAGES, report["stages"]["norms"], strict=True):
            assert (norms == 0) == (stage in (1, 2)), "ZeRO 1 and 2 clip by the norm that the guard knows"
    outputs = [output for _, output in two_ranks]
    assert re.search(r"step 1 skipped .* loss of rank 1 \(batch r1s1p0\)", outputs[0])
    assert re.search(r"step 3 skipped .* gradient norm of the net", outputs[0])
    assert "skipped (" not in outputs[1]


def _stages(ranks: Ranks) -> dict[str, Any]:
    """Compare a run with bad steps to one without them, bit for bit, under each stage."""
    equal, skipped, norms = {}, [], []
    for case in STAGES:
        runs = []
        for steps in (range(8), CLEAN):
            guard = StepGuard(GuardConfig(), ranks)
            with NormCounter() as counter:
                runs.append(_train(*case, steps, guard, ranks, counter))
            skipped.append(guard.skipped)
        norms.append(counter.count)
        equal["/".join(map(str, case))] = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    return {"equal": equal, "skipped": skipped[::2], "norms": norms}


class NormCounter(TorchDispatchMode):
    """Counts the norms that are computed while `counts` is true."""

    counts, count = False, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += self.counts and "norm" in str(function)
        return function(*args, **(kwargs or {}))


def _train(
    stage: int,
    bucket: int,
    accumulation_steps: int,
    steps: Any,
    guard: StepGuard,
    ranks: Ranks,
    counter: NormCounter,
) -> list[torch.Tensor]:
    """Return weights and moments after `steps`; in some, the last accumulation step is bad on one rank."""
    import deepspeed

    torch.manual_seed(0)
    # Sizes that two ranks share evenly: stage 3 pads others with uninitialised memory.
    net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))
    zero = {"stage": stage, "reduce_bucket_size": bucket, "overlap_comm": False}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    settings = OptimizerConfig(lr=1e-2)
    adamw = torch.optim.AdamW(net.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    engine, *_ = deepspeed.initialize(model=net, optimizer=adamw, config=config, dist_init_required=False)
    for step in steps:
        ranks.step_context.begin(step)
        names = [f"r{ranks.rank}s{step}p{part}" for part in range(accumulation_steps)]
        ranks.step_context.set_batches([describe_batch([name]) for name in names])
        losses = []
        for part in range(accumulation_steps):
            seed = 100 * step + 10 * part + ranks.rank
            inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
            loss = engine(inputs).square().mean()
            is_last = part + 1 == accumulation_steps
            if is_last and step in (1, 5) and ranks.rank == 1:
                loss = loss * NAN
            if is_last and step in (3, 6) and ranks.rank == 0:
                loss = loss + (0 * loss).sqrt()  # 0, with an infinite derivative times 0
            engine.backward(loss)
            losses.append(loss.detach())
            if not is_last:
                engine.step()
        if passes(guard, {"loss": torch.stack(losses)}, {"net": engine}):
            counter.counts = True
            engine.step()
            counter.counts = False
    return list(_tensors([engine.module.state_dict(), engine.optimizer.state_dict()]))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield copies of all tensors in nested containers, in order."""
    if isinstance(value, torch.Tensor):
        yield value.detach().clone()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


@pytest.mark.parametrize(("kind", "terms"), [("generator", "loss"), ("tokenizer", "l1, kl")])
def test_a_bad_step_of_a_task_leaves_weights_moments_and_averages_and_the_next_one_trains(
    two_ranks, kind, terms
):
    for report, output in two_ranks:
        assert report[kind]["skipped"] == [False, False, True, False], output
        assert report[kind]["changed"] == [True, True, False, True], output
    assert re.search(rf"step 2 skipped .*: {terms}.* of rank 1 \(.*batch \S+", two_ranks[0][1])


def _task(kind: str, latents: str, folder: str, ranks: Ranks) -> dict[str, list[bool]]:
    """Run four steps of a real task; rank 1 gets NaN in the third."""
    from cat_fast.training.config.load import load_run
    from cat_fast.training.tasks import make_task
    from tests.training.steps import train_step

    config, *overrides = TOKENIZER if kind == "tokenizer" else [*GENERATOR, f"data.latents={latents}"]
    if kind == "tokenizer":
        overrides.append("loss.gan_loss_starting_step=1")
    task: Any = make_task(load_run(config, [*overrides, f"output_dir={folder}/run"]), ranks)
    report: dict[str, list[bool]] = {"skipped": [], "changed": []}
    for step in range(4):
        before = list(_tensors(_state(task)))
        if step == 2 and ranks.rank == 1:
            _poison(task)
        ranks.step_context.begin(step)
        metrics = train_step(task, step)
        after = list(_tensors(_state(task)))
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        report["skipped"].append(SKIPPED in metrics)
        report["changed"].append(not same)
    return report


def _state(task: Any) -> list[Any]:
    """Return everything that a step may change, except the data position."""
    trainer = getattr(task, "trainer", None)
    engines = [trainer.engine, trainer.discriminator] if trainer else [task.engine]
    state = [[engine.module.state_dict(), engine.optimizer.state_dict()] for engine in engines]
    state.append([task.ema.averaged, torch.tensor(task.ema.updates)])
    if trainer:
        lecam = trainer.lecam.state_dict()
        state.append([torch.tensor(value) for value in lecam.values()])
    return state


def _poison(task: Any) -> None:
    """Make the next batch, and only that one, hold NaN."""
    owner, name = (task.source, "batch") if hasattr(task, "source") else (task.batches, "take")
    original = getattr(owner, name)

    def poisoned(*arguments: Any) -> Any:
        setattr(owner, name, original)
        batch = original(*arguments)
        (batch.images if hasattr(batch, "images") else batch[0][0].packed.tokens).fill_(NAN)
        return batch

    setattr(owner, name, poisoned)
