"""Neither nano run changes its numbers in silence: each loss of its first steps is compared with a kept one.

Other machines and thread counts take sums in another order, which rounds differently, and training amplifies
that. With other vector units (ATEN_CPU_CAPABILITY=default, ONEDNN_MAX_CPU_ISA=AVX2), two threads or the
operators' references (CAT_FAST_BACKEND=reference) losses differed by 3e-7 in the first step, and by at most
1.5e-4 in 20. Hence a relative tolerance of 2e-5 a step done: a learning rate off by 1 % lies outside it.
"""

import functools
import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.golden_losses import FOLDER, RUNS, made_with, train

RTOL_A_STEP = 2e-5

Steps = list[dict[str, float]]


def differences(found: Steps, kept: Steps) -> list[str]:
    """What differs by more than rounding, in words, the earliest step first."""
    told = [] if len(found) == len(kept) else [f"{len(found)} steps instead of {len(kept)}"]
    for step, (ours, golden) in enumerate(zip(found, kept, strict=False)):
        rtol = RTOL_A_STEP * (step + 1)
        for name, value in golden.items():
            if name not in ours:
                told.append(f"step {step}: {name} is missing")
            elif not math.isclose(ours[name], value, rel_tol=rtol, abs_tol=1e-8):
                apart = abs(ours[name] - value) / abs(value)
                told.append(f"step {step}: {name} is {ours[name]!r} instead of {value!r} ({apart:.1e} apart)")
    return told


def advice(told: list[str], made: dict[str, str]) -> str:
    now = made_with()
    changed = [f"{name} {made[name]} -> {now[name]}" for name in made if made[name] != now.get(name)]
    return "\n".join(
        [
            "The losses of a nano run are not those it had:",
            *told[:5],
            *([f"… and {len(told) - 5} more"] if len(told) > 5 else []),
            f"Since they were measured: {', '.join(changed) or 'no version or processor changed'}.",
            "A change of the mathematics shows here: of a loss, an optimiser, an initialisation, the data's",
            "order. Where it was meant, measure anew with `python -m tests.training.golden_losses`, commit",
            "the files together with the change, and say in the message why the numbers moved.",
        ]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def losses(folder):
    """Of a run as the golden file has it, trained once, in folder/kind."""
    return functools.cache(lambda kind: train(kind, golden(kind)["arguments"], folder / kind))


def golden(kind: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{kind}.json").read_text())


@pytest.mark.parametrize("kind", RUNS)
def test_every_loss_is_what_it_was(kind, losses):
    told = differences(losses(kind), golden(kind)["steps"])
    assert not told, advice(told, golden(kind)["made_with"])


@pytest.mark.parametrize(("kind", "lr"), [("tokenizer", 1.5e-4), ("generator", 1e-3)])
def test_a_learning_rate_one_percent_higher_would_be_noticed(kind, lr, folder):
    faster = [*golden(kind)["arguments"], f"optimizer.lr={1.01 * lr}"]
    assert differences(train(kind, faster, folder / f"{kind}_faster"), golden(kind)["steps"])


def test_grids_and_a_talkative_log_change_no_bit(losses, folder):
    told = folder / "telling"
    logging = ["logging.every_steps=1", "logging.scalars_every_steps=3", "logging.grid_every_steps=3"]
    assert train("tokenizer", [*golden("tokenizer")["arguments"], *logging], told) == losses("tokenizer")
    name = "model/diffusion_pytorch_model.safetensors"
    weights, straight = load_file(told / name), load_file(folder / "tokenizer" / name)
    assert weights.keys() == straight.keys()
    assert all(torch.equal(weights[key], value) for key, value in straight.items())
    grids = sorted(path.name for path in told.glob("grids/*.png"))
    assert grids == [f"step_{n:08d}.png" for n in range(3, 21, 3)]


@pytest.mark.parametrize("kind", RUNS)
def test_rounding_passes_and_what_is_more_does_not(kind):
    kept = golden(kind)["steps"]

    def scaled(factor):
        return [{name: value * factor for name, value in step.items()} for step in kept]

    assert differences(scaled(1 + 1e-6), kept) == []
    assert differences(kept[:-1], kept) == ["19 steps instead of 20"]
    (missing,) = differences([{}, *kept[1:]], kept)[:1]
    assert missing == f"step 0: {next(iter(kept[0]))} is missing"
    told = differences(scaled(1 + 1e-3), kept)
    assert len(told) == sum(map(len, kept))
    message = advice(told, {**golden(kind)["made_with"], "torch": "1.0"})
    assert "torch 1.0 -> " in message
    assert "python -m tests.training.golden_losses" in message
