"""Resuming with another number of ranks: from two to one, and from one to two.

Every weight, moment, step count and average must equal the saved one.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cat_fast.errors import UserError
from cat_fast.training.checkpoints.engine_state import load_engine
from cat_fast.training.runtime.ranks import Ranks
from tests.training.rank_processes import run_ranks
from tests.training.rescaled_worker import GANS, GENERATORS

WORKER = "tests.training.rescaled_worker:main"
KINDS = [f"gans/{name}" for name in GANS] + [f"generators/{name}" for name in GENERATORS]


@pytest.fixture(scope="module")
def on_one_rank(latents, gans, generators, tmp_path_factory):
    """Output folder of one rank that resumed from the checkpoints of two."""
    out = tmp_path_factory.mktemp("one")
    run_ranks(WORKER, 1, latents, gans, generators, out)
    return out


def require_loaded(source: Path, folder: Path, world_size: int) -> None:
    saved, loaded = load_file(source / "saved.safetensors"), load_file(folder / "loaded.safetensors")
    assert saved.keys() == loaded.keys()
    for name, value in saved.items():
        assert torch.equal(loaded[name], value), name
    for rank in range(world_size):
        held = load_file(folder / f"rank{rank}.safetensors")
        assert held
        for name, value in held.items():
            assert torch.equal(value, saved[name]), name
    after = load_file(folder / "saved.safetensors")
    assert after["model.step"].item() == saved["model.step"].item() + 2
    assert all(value.isfinite().all() for value in after.values())
    # The temporary universal checkpoint is deleted.
    assert sorted(path.name for path in source.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_resumes_from_two(kind, gans, generators, on_one_rank):
    source = {"gans": gans, "generators": generators}[kind.split("/")[0]] / kind.split("/")[1]
    require_loaded(source, on_one_rank / kind, 1)


@pytest.mark.slow
def test_two_ranks_resume_from_one(latents, on_one_rank, tmp_path):
    run_ranks(WORKER, 2, latents, on_one_rank / "gans", on_one_rank / "generators", tmp_path)
    for kind in KINDS:
        require_loaded(on_one_rank / kind, tmp_path / kind, 2)


@pytest.mark.parametrize(("saved", "stage"), [("generators/zero3", 2), ("gans/zero1", 3), ("gans/zero1", 0)])
def test_a_checkpoint_of_another_zero_stage_is_rejected(saved, stage, gans, generators):
    kind, name = saved.split("/")
    folder = gans / name / "half/autoencoder" if kind == "gans" else generators / name / "half/generator"
    engine = SimpleNamespace(zero_optimization_stage=lambda: stage)
    with pytest.raises(UserError, match="resume with stage"):
        load_engine(engine, folder, Ranks(), "model")


@pytest.mark.parametrize(
    "saved",
    ["gans/zero1/half/autoencoder", "gans/zero2_bf16/half/autoencoder", "generators/zero3/half/generator"],
)
def test_a_checkpoint_of_other_sizes_is_rejected_in_one_line(saved, gans, generators):
    folder = {"gans": gans, "generators": generators}[saved.split("/")[0]] / saved.partition("/")[2]
    stage = int(saved.partition("zero")[2][0])
    engine = SimpleNamespace(zero_optimization_stage=lambda: stage, module=torch.nn.Linear(2, 3))
    message = r"model has other sizes, weight has shape \(3, 2\), but no such weight in .*: restore the sizes"
    with pytest.raises(UserError, match=message):
        load_engine(engine, folder, Ranks(), "model")
