"""Regression test of both nano runs: each loss of the first steps is compared with a golden file.

Other machines and thread counts sum in another order, which rounds differently, and training amplifies the
difference, a GAN most of all. Without AVX, with the operators' references and with another order in matrix
products (ATEN_CPU_CAPABILITY=default, ONEDNN_MAX_CPU_ISA=SSE41, MKL_CBWR=COMPATIBLE,
CAT_FAST_BACKEND=reference) the tokenizer's losses differed by 3e-7 in the first step and by at most 2.5e-4 in
20 steps, the DiT's by 1e-7. The tolerances grow with the steps and are at least four times as wide.
"""

import functools
import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.golden_losses import FOLDER, RUNS, made_with, train

RTOL_PER_STEP = {"tokenizer": 1e-4, "tokenizer_without_perceptual": 1e-4, "generator": 2e-6}

Steps = list[dict[str, float]]


def differences(kind: str, found: Steps) -> list[str]:
    """Describe the differences from the golden file that exceed rounding, earliest step first."""
    expected = golden(kind)["steps"]
    lines = [] if len(found) == len(expected) else [f"expected {len(expected)} steps, got {len(found)}"]
    for step, (losses, terms) in enumerate(zip(found, expected, strict=False)):
        rtol = RTOL_PER_STEP[kind] * (step + 1)
        for name, value in terms.items():
            if name not in losses:
                lines.append(f"step {step}: {name} is missing")
            elif not math.isclose(losses[name], value, rel_tol=rtol, abs_tol=1e-8):
                error = abs(losses[name] - value) / abs(value)
                lines.append(
                    f"step {step}: {name}: expected {value!r}, got {losses[name]!r} ({error:.1e} off)"
                )
    return lines


def explanation(lines: list[str], made: dict[str, str]) -> str:
    now = made_with()
    changed = [f"{name} {made[name]} -> {now[name]}" for name in made if made[name] != now.get(name)]
    return "\n".join(
        [
            "The losses of a nano run differ from the golden file:",
            *lines[:5],
            *([f"… and {len(lines) - 5} more"] if len(lines) > 5 else []),
            f"Changed since it was measured: {', '.join(changed) or 'no version or processor'}.",
            "This test detects changes of the mathematics: of losses, optimiser, initialisation, data order.",
            "If the change is intended, measure again with `python -m tests.training.golden_losses`, commit",
            "the files together with the change, and explain in the message why the numbers changed.",
        ]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def losses(folder):
    """Losses of a run with the golden file's arguments, trained once, in folder/kind."""
    return functools.cache(lambda kind: train(kind, golden(kind)["arguments"], folder / kind))


def golden(kind: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{kind}.json").read_text())


@pytest.mark.parametrize("kind", RUNS)
def test_losses_match_the_golden_file(kind, losses):
    found = differences(kind, losses(kind))
    assert not found, explanation(found, golden(kind)["made_with"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lr"), [("tokenizer", 1.5e-4), ("generator", 1e-3)])
def test_a_learning_rate_one_percent_higher_is_detected(kind, lr, folder):
    faster = [*golden(kind)["arguments"], f"optimizer.lr={1.01 * lr}"]
    assert differences(kind, train(kind, faster, folder / f"{kind}_faster"))


def test_grids_and_frequent_logging_leave_the_run_bit_equal(losses, folder):
    logged = folder / "logged"
    logging = ["logging.every_steps=1", "logging.scalars_every_steps=3", "logging.grid_every_steps=3"]
    assert train("tokenizer", [*golden("tokenizer")["arguments"], *logging], logged) == losses("tokenizer")
    name = "model/diffusion_pytorch_model.safetensors"
    weights, expected = load_file(logged / name), load_file(folder / "tokenizer" / name)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
    grids = sorted(path.name for path in logged.glob("grids/*.png"))
    assert grids == [f"step_{n:08d}.png" for n in range(3, 21, 3)]


@pytest.mark.parametrize("kind", RUNS)
def test_rounding_differences_pass_and_larger_ones_fail(kind):
    expected = golden(kind)["steps"]

    def scaled(factor):
        return [{name: value * factor for name, value in step.items()} for step in expected]

    assert differences(kind, scaled(1 + 1e-6)) == []
    assert differences(kind, expected[:-1]) == ["expected 20 steps, got 19"]
    (missing,) = differences(kind, [{}, *expected[1:]])[:1]
    assert missing == f"step 0: {next(iter(expected[0]))} is missing"
    found = differences(kind, scaled(1 + 1e-2))
    assert len(found) == sum(map(len, expected))
    message = explanation(found, {**golden(kind)["made_with"], "torch": "1.0"})
    assert "torch 1.0 -> " in message
    assert "python -m tests.training.golden_losses" in message
