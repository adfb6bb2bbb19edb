"""Rehearsal on a minimal task: what it tries out, what it refuses, and when it is repeated."""

import errno
import json
import random
import resource
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cat_fast.errors import UserError
from cat_fast.training import rehearsal
from cat_fast.training.checkpoints.space import StateBytes, require_space
from cat_fast.training.checkpoints.store import CheckpointStore
from cat_fast.training.config.settings import CheckpointConfig, LoggingConfig, RunConfig, ScheduleConfig
from cat_fast.training.health.run_status import summarize
from cat_fast.training.loop import run
from cat_fast.training.metrics.run_log import read_metrics
from cat_fast.training.rehearsal import LargestStep, rehearse
from cat_fast.training.runtime.host_memory import available_bytes, memory_limit
from cat_fast.training.runtime.ranks import Ranks
from tests.training.steps import PlainTask
from tests.training.thread_ranks import on_thread_ranks

MIB = 2**20


class Recorder(PlainTask):
    """Task that records the names of its calls and fails in those of `errors`."""

    def __init__(self, errors: dict[str, Exception] | None = None, sizes: int = 0) -> None:
        self.calls: list[str] = []
        self.errors, self.sizes = errors or {}, sizes

    def called(self, name: str) -> None:
        self.calls.append(name)
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        if name in self.errors:
            raise self.errors[name]

    def largest_step(self) -> LargestStep:
        return LargestStep(
            what="4 images at 8x",
            lower="data.batch_size",
            settings="discriminator",
            run=lambda: self.called("largest step"),
        )

    def state_bytes(self) -> StateBytes:
        """Return sizes of files that take no time to write, unless others are given."""
        return StateBytes(checkpoint=self.sizes, model=self.sizes)

    def train_step(self, step: int) -> dict[str, float]:
        self.called(f"step {step}")
        return {"loss": 1.0}

    def grid(self, step: int, columns: int | None = None) -> tuple[Image.Image, dict[str, float]]:
        self.called(f"grid of {columns}")
        return Image.new("RGB", (4, 4)), {}

    def save(self, folder: Path) -> None:
        (folder / "half").write_text("half")
        self.called("save")

    def load(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None:
        folder.mkdir()
        self.called("export")

    def close(self) -> None: ...


def settings(folder: Path, total: int = 2, grids: int = 0, **changes: object) -> RunConfig:
    return RunConfig(
        task="counter",
        output_dir=str(folder),
        schedule=ScheduleConfig(total_steps=total),
        checkpoint=CheckpointConfig(every_steps=1),
        logging=LoggingConfig(grid_every_steps=grids),
        **changes,
    )


def rehearsed(task: Recorder, config: RunConfig, ranks: Ranks | None = None, first: int = 0) -> None:
    folder = Path(config.output_dir)
    rehearse(task, config, CheckpointStore(folder / "checkpoints", ranks or Ranks()), folder / "model", first)


def test_everything_that_happens_late_is_tried_out_before_step_0(tmp_path, capsys):
    task = Recorder()
    run(task, settings(tmp_path, grids=2), Ranks())
    assert task.calls[:5] == ["largest step", "grid of 1", "save", "export", "step 0"]
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("rehearsed in"))
    assert line.endswith(
        "s: a step of 4 images at 8x, a grid, a checkpoint of 3.81e-06 MiB and the model of 0 MiB"
    )
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]


def test_large_states_are_not_written_and_every_rank_only_tries_its_file(tmp_path):
    task = Recorder(sizes=100 * MIB)
    rehearsed(task, settings(tmp_path))
    assert task.calls == ["largest step"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["rehearsal.json"]


def test_a_rehearsal_leaves_random_states_and_the_folder_as_they_were(tmp_path):
    def state() -> list[str]:
        return [str(torch.get_rng_state().tolist()), str(random.getstate()), str(np.random.get_state())]  # noqa: NPY002

    before = state()
    rehearsed(Recorder(), settings(tmp_path, grids=1))
    assert state() == before
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["rehearsal.json"]


def test_a_rehearsal_can_be_skipped(tmp_path):
    task = Recorder({"largest step": RuntimeError("too large")})
    run(task, settings(tmp_path, rehearsal=False), Ranks())
    assert task.calls[0] == "step 0"
    assert not (tmp_path / "rehearsal.json").exists()


def test_a_resumed_run_is_rehearsed_again_only_if_its_configuration_changed(tmp_path):
    rehearsed(Recorder(), settings(tmp_path))

    def calls(**changes: object) -> list[str]:
        task = Recorder()
        rehearsed(task, settings(tmp_path, **changes), first=1)
        return task.calls

    assert calls() == []
    resumed = settings(tmp_path)
    resumed.checkpoint.resume = "never"  # as when the command that resumes overrides it
    task = Recorder()
    rehearsed(task, resumed, first=1)
    assert task.calls == []
    assert calls(seed=1) == ["largest step", "save", "export"]
    assert calls(seed=1) == []
    assert calls(deepspeed="deepspeed/zero1.json") != []
    assert calls(total=3) != []
    assert calls(total=1) == [], "a complete run has no step left"
    (tmp_path / "rehearsal.json").write_text("[]")
    assert calls(total=3) != []


OUT_OF_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "largest step",
            RuntimeError("shapes differ\nand more"),
            r"^rehearsal of a step of 4 images at 8x fails \(RuntimeError: shapes differ\): check discr\w+$",
        ),
        (
            "largest step",
            OUT_OF_MEMORY,
            "it needs more than the .* that this rank can use: lower data.batch_size, or set "
            "gradient_checkpointing=true, or set precision=bf16$",
        ),
        ("largest step", MemoryError(), "lower data.batch_size"),
        ("largest step", UserError("r1 not finite"), "rehearsal of a step of 4 images at 8x: r1 not finite"),
        ("grid of 1", ValueError("no font"), r"grid fails \(ValueError: no font\).*grid_every_steps=0"),
        ("grid of 1", UserError("grids: cannot be written"), "^grids: cannot be written$"),
        ("save", OSError(errno.ENOSPC, "No space"), r"a checkpoint cannot be written \(the disk is full\)"),
        (
            "save",
            TypeError("not JSON"),
            r"rehearsal of a checkpoint fails \(TypeError: not JSON\): check model",
        ),
        ("export", OSError(errno.EROFS, "Read-only"), r"the model cannot be written \(Read-only\)"),
        ("export", KeyError("weight"), r"export fails \(KeyError: 'weight'\): check model"),
    ],
)
def test_what_would_fail_late_is_refused_before_step_0(tmp_path, name, error, message):
    task = Recorder({name: error})
    with pytest.raises(UserError, match=message):
        run(task, settings(tmp_path, grids=2), Ranks())
    assert "step 0" not in task.calls
    assert not [
        p.name for p in tmp_path.iterdir() if p.name in ("model", "checkpoints", "grids", ".model.part")
    ]
    assert not read_metrics(tmp_path)
    state = summarize(tmp_path)
    assert state
    assert state.state == "failed"


def test_gradient_checkpointing_is_not_advised_where_it_has_no_effect(tmp_path, monkeypatch):
    monkeypatch.setattr(RunConfig, "checkpoints_gradients", False)
    with pytest.raises(UserError, match=r"lower data\.batch_size, or set precision=bf16$"):
        run(Recorder({"largest step": OUT_OF_MEMORY}), settings(tmp_path), Ranks())


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("model", Path.touch, "model is not a folder, .* move it, or choose another output_dir"),
        ("model", lambda path: path.symlink_to(path.parent), "model is a symbolic link"),
        ("checkpoints", Path.touch, "checkpoints is not a folder"),
        ("grids", Path.touch, "grids is not a folder"),
        ("summary.json", Path.mkdir, "summary.json is a folder"),
    ],
)
def test_names_that_are_taken_are_refused(tmp_path, name, make: Callable[[Path], None], message):
    make(tmp_path / name)
    with pytest.raises(UserError, match=message):
        run(Recorder(), settings(tmp_path, grids=2), Ranks())


def test_an_error_of_one_rank_ends_all_of_them(tmp_path):
    def on_rank(ranks: Ranks) -> str:
        task = Recorder({"largest step": OUT_OF_MEMORY} if ranks.rank else {})
        with pytest.raises(UserError) as error:
            rehearsed(task, settings(tmp_path), ranks)
        return str(error.value)

    first, second = on_thread_ranks(2, on_rank)
    assert first == second
    assert first.endswith("(on rank 1)")


@pytest.mark.parametrize(
    ("keep", "existing", "first", "total", "checkpoints"),
    [
        (2, 0, 0, 10, 3),
        (9, 0, 0, 3, 3),
        (1, 1, 4, 10, 1),
        (2, 2, 4, 10, 1),
        (1, 5, 4, 10, 1),
        (3, 1, 4, 10, 3),
    ],
)
def test_space_is_needed_for_the_checkpoints_that_exist_at_a_time(
    tmp_path, monkeypatch, keep, existing, first, total, checkpoints
):
    for number in range(existing):
        (tmp_path / f"checkpoints/step_{number:08d}").mkdir(parents=True)
    config = settings(tmp_path, total)
    config.checkpoint.keep_last = keep
    sizes = StateBytes(checkpoint=100 * MIB, model=5 * MIB)
    # Without room to write a checkpoint next to those kept, there may be room for the model after it.
    needed = max(100 * checkpoints, 100 * (min(existing + total - first, keep) - existing) + 5) * MIB

    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))

    free(needed)
    require_space(config, tmp_path / "checkpoints", sizes, first)
    free(needed - 1)
    with pytest.raises(UserError, match=rf"{tmp_path} has .* free, but .* lower checkpoint\.keep_last"):
        require_space(config, tmp_path / "checkpoints", sizes, first)


def test_too_small_a_disk_is_refused_before_step_0(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * MIB))
    task = Recorder(sizes=2 * MIB)
    with pytest.raises(UserError, match="has 3 MiB free, but this run needs 6 MiB"):
        run(task, settings(tmp_path), Ranks())
    assert task.calls == ["largest step"]


def test_too_little_memory_for_the_copy_of_the_averages_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "available_bytes", lambda: MIB)
    with pytest.raises(UserError, match="averaged weights needs 100 MiB of memory, but 1 MiB are available"):
        rehearsed(Recorder(sizes=100 * MIB), settings(tmp_path))


def test_memory_beyond_that_of_the_machine_is_refused_instead_of_ending_the_process(tmp_path, monkeypatch):
    class Large(Recorder):
        def called(self, name: str) -> None:
            torch.ones(2**29)

    monkeypatch.setattr(rehearsal, "memory_per_rank", lambda world_size: 200 * MIB)
    with pytest.raises(UserError, match=r"4 images at 8x: it needs more than the 200 MiB of memory that"):
        rehearsed(Large(), settings(tmp_path))
    with memory_limit(2**31):
        assert torch.ones(2**28).numel() == 2**28


def test_the_last_of_overlapping_limits_of_memory_restores_that_of_the_process():
    before = resource.getrlimit(resource.RLIMIT_AS)
    first, second = memory_limit(2**33), memory_limit(2**34)
    with ExitStack() as later:
        with ExitStack() as sooner:
            sooner.enter_context(first)
            smaller = resource.getrlimit(resource.RLIMIT_AS)[0]
            later.enter_context(second)
            assert resource.getrlimit(resource.RLIMIT_AS)[0] == smaller
        assert smaller < resource.getrlimit(resource.RLIMIT_AS)[0]
        assert resource.getrlimit(resource.RLIMIT_AS) != before
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_available_memory_is_that_of_the_container(tmp_path):
    everything = available_bytes(tmp_path)
    assert everything > 0
    values = {"memory.max": 900, "memory.current": 700}
    for name, value in values.items():
        (tmp_path / name).write_text(f"{value}\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\n")
    assert available_bytes(tmp_path) == 300
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) > 300
    older = tmp_path / "memory"
    older.mkdir()
    for name, value in {"limit_in_bytes": 50, "usage_in_bytes": 60}.items():
        (older / f"memory.{name}").write_text(str(value))
    (older / "memory.stat").write_text("total_inactive_file 5\n")
    assert available_bytes(tmp_path) == 0


def test_the_record_names_what_was_rehearsed(tmp_path):
    rehearsed(Recorder(sizes=100 * MIB), settings(tmp_path, grids=1))
    record = json.loads((tmp_path / "rehearsal.json").read_text())
    assert record["rehearsed"] == ["a step of 4 images at 8x", "a grid", "room for checkpoints of 100 MiB"]
