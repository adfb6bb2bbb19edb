"""Neither nano run changes its numbers in silence: each loss of its first steps is compared with a kept one.

Other machines and thread counts take sums in another order, which rounds differently, and training amplifies
that, a GAN most of all. Without AVX, in the operators' references and with another order within matrix
products (ATEN_CPU_CAPABILITY=default, ONEDNN_MAX_CPU_ISA=SSE41, MKL_CBWR=COMPATIBLE,
CAT_FAST_BACKEND=reference) the tokenizer's losses differed by 3e-7 in the first step and by at most 2.5e-4 in
20, the generator's by 1e-7. The tolerances grow with the steps, and are at least four times as wide as that.
"""

import functools
import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.golden_losses import FOLDER, RUNS, made_with, train

RTOL_A_STEP = {"tokenizer": 1e-4, "generator": 2e-6}

Steps = list[dict[str, float]]


def differences(kind: str, found: Steps) -> list[str]:
    """What differs from the golden file by more than rounding, in words, the earliest step first."""
    kept = golden(kind)["steps"]
    told = [] if len(found) == len(kept) else [f"{len(found)} steps instead of {len(kept)}"]
    for step, (ours, terms) in enumerate(zip(found, kept, strict=False)):
        rtol = RTOL_A_STEP[kind] * (step + 1)
        for name, value in terms.items():
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
    told = differences(kind, losses(kind))
    assert not told, advice(told, golden(kind)["made_with"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lr"), [("tokenizer", 1.5e-4), ("generator", 1e-3)])
def test_a_learning_rate_one_percent_higher_would_be_noticed(kind, lr, folder):
    faster = [*golden(kind)["arguments"], f"optimizer.lr={1.01 * lr}"]
    assert differences(kind, train(kind, faster, folder / f"{kind}_faster"))


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

    assert differences(kind, scaled(1 + 1e-6)) == []
    assert differences(kind, kept[:-1]) == ["19 steps instead of 20"]
    (missing,) = differences(kind, [{}, *kept[1:]])[:1]
    assert missing == f"step 0: {next(iter(kept[0]))} is missing"
    told = differences(kind, scaled(1 + 1e-2))
    assert len(told) == sum(map(len, kept))
    message = advice(told, {**golden(kind)["made_with"], "torch": "1.0"})
    assert "torch 1.0 -> " in message
    assert "python -m tests.training.golden_losses" in message
