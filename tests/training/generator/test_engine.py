"""The generator's training on two ranks, under ZeRO 1 to 3, is plain torch on their batches.

All cases of `generator_case.py` are trained in one launch of `generator_worker.py`, as runs are, and compared
with `plain_generator.py`; the same launch saves half way and goes on from that.
"""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

from cat_fast.generator import DiT
from tests.training.generator.generator_case import CASES, CHECKPOINT_STEP, STEPS, WORLD_SIZE, Case
from tests.training.generator.plain_generator import PlainGenerator

BY_NAME = {case.name: case for case in CASES}
FP32 = [case for case in CASES if case.precision == "fp32"]


def named(cases: list[Case] | tuple[Case, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def plain(latents, tmp_path_factory):
    """Of a case: the state and the losses of plain torch."""
    folder = tmp_path_factory.mktemp("plain")
    return functools.cache(lambda case, **how: PlainGenerator(case, folder, latents, **how).train())


@named(FP32)
def test_weights_moments_and_average_are_those_of_plain_torch_to_the_bit(case, generators, plain):
    state, (expected, losses) = load_file(generators / case.name / "straight.safetensors"), plain(case)
    assert state.pop("model.step").tolist() == [STEPS]
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    for rank in range(WORLD_SIZE):  # what its next forward pass would use
        held = load_file(generators / case.name / f"rank{rank}.safetensors")
        assert held.keys() == {name for name in expected if name.startswith("model.weight.")}
        for name, value in held.items():
            assert torch.equal(value, expected[name]), name
    metrics = json.loads((generators / case.name / "metrics.json").read_text())
    assert [told["loss"] for told in metrics] == pytest.approx(losses, rel=1e-12)


@named([BY_NAME["zero2_images"], BY_NAME["zero3_in_pieces"], BY_NAME["zero3_accumulated_clipped"]])
def test_they_are_those_of_the_undivided_batch_but_for_rounding(case, generators, plain):
    state, (expected, losses) = (
        load_file(generators / case.name / "straight.safetensors"),
        plain(case, undivided=True),
    )
    for name, value in expected.items():
        if name.startswith(("model.weight.", "ema.")):
            assert (state[name] - value).norm() < 1e-5 * value.norm(), name
    for kind in ("model.exp_avg.", "model.exp_avg_sq."):
        keys = [name for name in expected if name.startswith(kind)]
        ours, theirs = (torch.cat([s[key].flatten() for key in keys]) for s in (state, expected))
        assert (ours - theirs).norm() < 1e-5 * theirs.norm(), kind
    metrics = json.loads((generators / case.name / "metrics.json").read_text())
    assert [told["loss"] for told in metrics] == pytest.approx(losses, rel=1e-5)


@named(CASES)
def test_the_exported_model_is_the_average(case, generators):
    state = load_file(generators / case.name / "straight.safetensors")
    model = DiT.from_pretrained(generators / case.name / "model")
    averaged = {f"ema.{name}": value for name, value in model.named_parameters()}
    assert averaged.keys() == {name for name in state if name.startswith("ema.")}
    for name, value in averaged.items():
        assert torch.equal(state[name], value), name


@named(CASES)
def test_a_run_that_goes_on_from_its_checkpoint_ends_where_a_straight_one_does(case, generators):
    straight, resumed, saved = (
        load_file(generators / case.name / f"{name}.safetensors") for name in ("straight", "resumed", "saved")
    )
    assert saved["model.step"].tolist() == [CHECKPOINT_STEP]
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name
    assert any(not torch.equal(saved[name], value) for name, value in straight.items())


def test_in_bf16_it_trains_and_keeps_fp32_weights(generators):
    losses = {}
    for name in ("zero3_bf16", "zero3_in_pieces"):
        metrics = json.loads((generators / name / "metrics.json").read_text())
        losses[name] = [told["loss"] for told in metrics]
    bf16, fp32 = losses.values()
    assert bf16 == pytest.approx(fp32, rel=0.02)
    assert bf16 != fp32
    state = load_file(generators / "zero3_bf16" / "straight.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
