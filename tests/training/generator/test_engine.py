"""The generator's training on two ranks, under ZeRO 1 to 3, equals plain torch on the same batches.

One launch of `generator_worker.py` trains all cases of `generator_case.py`, also from a checkpoint. The
results are compared with `plain_generator.py`.
"""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

from cat_fast.generator import DiT
from cat_fast.kernels.linear.op import using
from tests.training.generator.generator_case import CASES, CHECKPOINT_STEP, STEPS, WORLD_SIZE, Case
from tests.training.generator.plain_generator import PlainGenerator

BY_NAME = {case.name: case for case in CASES}
FP32 = [case for case in CASES if case.precision == "fp32"]


def named(cases: list[Case] | tuple[Case, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def plain(latents, tmp_path_factory):
    """Function that returns the state and the losses of a case in plain torch."""
    folder = tmp_path_factory.mktemp("plain")

    def train(case, **how):
        with using(case.linear_backend):
            return PlainGenerator(case, folder, latents, **how).train()

    return functools.cache(train)


@named(FP32)
def test_weights_moments_and_average_are_bit_equal_to_plain_torch(case, generators, plain):
    state, (expected, losses) = load_file(generators / case.name / "straight.safetensors"), plain(case)
    assert state.pop("model.step").tolist() == [STEPS]
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    for rank in range(WORLD_SIZE):  # weights for the rank's next forward pass
        held = load_file(generators / case.name / f"rank{rank}.safetensors")
        assert held.keys() == {name for name in expected if name.startswith("model.weight.")}
        for name, value in held.items():
            assert torch.equal(value, expected[name]), name
    metrics = json.loads((generators / case.name / "metrics.json").read_text())
    assert [record["loss"] for record in metrics] == pytest.approx(losses, rel=1e-12)


@named([BY_NAME["zero2_images"], BY_NAME["zero3_in_pieces"], BY_NAME["zero3_accumulated_clipped"]])
def test_they_equal_one_undivided_batch_up_to_rounding(case, generators, plain):
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
    assert [record["loss"] for record in metrics] == pytest.approx(losses, rel=1e-5)


@named(CASES)
def test_exported_model_has_averaged_weights(case, generators):
    state = load_file(generators / case.name / "straight.safetensors")
    model = DiT.from_pretrained(generators / case.name / "model")
    averaged = {f"ema.{name}": value for name, value in model.named_parameters()}
    assert averaged.keys() == {name for name in state if name.startswith("ema.")}
    for name, value in averaged.items():
        assert torch.equal(state[name], value), name


@named(CASES)
def test_resumed_run_ends_in_the_state_of_an_uninterrupted_one(case, generators):
    straight, resumed, saved = (
        load_file(generators / case.name / f"{name}.safetensors") for name in ("straight", "resumed", "saved")
    )
    assert saved["model.step"].tolist() == [CHECKPOINT_STEP]
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name
    assert any(not torch.equal(saved[name], value) for name, value in straight.items())


def test_bf16_training_keeps_fp32_weights(generators):
    losses = {}
    for name in ("zero3_bf16", "zero3_in_pieces"):
        metrics = json.loads((generators / name / "metrics.json").read_text())
        losses[name] = [record["loss"] for record in metrics]
    bf16, fp32 = losses.values()
    assert bf16 == pytest.approx(fp32, rel=0.02)
    assert bf16 != fp32
    state = load_file(generators / "zero3_bf16" / "straight.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
