"""Two engines on two ranks at different ratios, with a GAN, equal plain torch on all their images.

One launch of `gan_worker.py` trains all cases of `gan_case.py` with the engines and steps of real runs. The
results are compared with `plain_gan.py`.
"""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

from cat_fast.kernels.linear.op import using
from tests.training.tokenizer.gan_case import CASES, GAN_FROM, LR, RATIOS, STEPS, WORLD_SIZE, Case, ratio_of
from tests.training.tokenizer.plain_gan import PlainGAN

BY_NAME = {case.name: case for case in CASES}
FP32 = [case for case in CASES if case.precision == "fp32"]
KEY_BIAS = "mid_block.attentions.0.to_k.bias"
"""Softmax is invariant to a constant added to all scores of a query. The gradient of a key's bias is pure
rounding error, which AdamW scales to full steps."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Function that returns the state and the metrics of a case in plain torch."""
    folder = tmp_path_factory.mktemp("plain")

    def train(case, **how):
        with using(case.linear_backend):
            return PlainGAN(case, folder, **how).train()

    return functools.cache(train)


def test_ranks_draw_all_nine_pairs_of_ratios_while_the_gan_trains():
    assert {(ratio_of(step, 0), ratio_of(step, 1)) for step in range(GAN_FROM, STEPS)} == {
        (a, b) for a in RATIOS for b in RATIOS
    }


def states(folder, case: Case, *names: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / case.name / f"{name}.safetensors") for name in names]


def metrics_of(folder, case: Case) -> list[dict[str, float]]:
    return json.loads((folder / case.name / "metrics.json").read_text())


@pytest.mark.parametrize("case", FP32, ids=lambda case: case.name)
def test_weights_moments_and_average_are_bit_equal_to_plain_torch(case, gans, plain):
    (state,), (expected, _) = states(gans, case, "straight"), plain(case)
    assert {name: state.pop(f"{name}.step").tolist() for name in ("model", "discriminator")} == {
        "model": [STEPS],
        "discriminator": [STEPS - GAN_FROM],
    }
    del state["lecam"]
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    for held in states(
        gans, case, *(f"rank{rank}" for rank in range(WORLD_SIZE))
    ):  # for the next forward pass
        assert held.keys() == {name for name in expected if name.split(".")[1] == "weight"}
        for name, value in held.items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("name", ["zero1", "zero1_regularised_clipped", "zero2_accumulated"])
def test_they_equal_one_undivided_batch_up_to_rounding(name, gans, plain):
    (state,) = states(gans, BY_NAME[name], "straight")
    expected, losses = plain(BY_NAME[name], undivided=True)
    for key, value in expected.items():
        if key.endswith(KEY_BIAS):
            assert (state[key] - value).abs().max() <= 2 * STEPS * LR
        elif ".weight." in key or key.startswith("ema."):
            # A bias that is initialized to zero is smaller than ten steps can move it.
            size = max(value.norm(), STEPS * LR * value.numel() ** 0.5)
            assert (state[key] - value).norm() < 1e-5 * size, key
    for kind in [f"{model}.{m}." for model in ("model", "discriminator") for m in ("exp_avg", "exp_avg_sq")]:
        keys = [key for key in expected if key.startswith(kind)]
        ours, theirs = (torch.cat([s[key].flatten() for key in keys]) for s in (state, expected))
        assert (ours - theirs).norm() < 1e-5 * theirs.norm(), kind
    for logged, wanted in zip(metrics_of(gans, BY_NAME[name]), losses, strict=True):
        logged_losses = {name: logged[name] for name in wanted}
        assert logged_losses == pytest.approx(wanted, rel=1e-5, abs=1e-6)  # mean logits are near zero


def test_unused_blocks_still_decay(gans, plain):
    """Unused blocks get zero gradients, so their moments and weights decay; skipping them would differ."""
    (state,) = states(gans, BY_NAME["zero2_onednn"], "straight")
    skipped, _ = plain(BY_NAME["zero2_onednn"], skip_idle=True)
    different = {name for name, value in skipped.items() if not torch.equal(state[name], value)}
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert any(name.startswith(f"model.{kind}.decoder.channel_matching.2.") for name in different)


@pytest.mark.parametrize("case", FP32, ids=lambda case: case.name)
def test_logged_losses_are_means_over_images_for_unequal_ranks(case, gans, plain):
    for step, (logged, wanted) in enumerate(zip(metrics_of(gans, case), plain(case)[1], strict=True)):
        assert {name: logged[name] for name in wanted} == pytest.approx(wanted, rel=1e-12)
        images = sum(len(case.images(step, rank, 0)) for rank in range(WORLD_SIZE)) * case.accumulation_steps
        assert logged["images"] == images


def test_in_bf16_the_autoencoder_trains_and_the_discriminator_stays_in_fp32(gans):
    bf16, fp32 = BY_NAME["zero2_bf16"], BY_NAME["zero2_regularised"]
    assert json.loads((gans / bf16.name / "dtypes.json").read_text()) == {
        "autoencoder's output": "torch.bfloat16",
        "discriminator's input": "torch.float32",
        "discriminator's logits": "torch.float32",
        "autoencoder's loss": "torch.float32",
        "discriminator's loss": "torch.float32",
    }
    for state in states(gans, bf16, "straight", "rank0", "rank1"):
        state.pop("lecam", None)
        assert {value.dtype for value in state.values()} == {torch.float32}
    for logged, wanted in zip(metrics_of(gans, bf16), metrics_of(gans, fp32), strict=True):
        assert logged.keys() == wanted.keys()
        assert logged["l1"] == pytest.approx(wanted["l1"], rel=0.02)
        assert logged["l1"] != wanted["l1"]


@pytest.mark.parametrize("case", [case for case in CASES if case.saved], ids=lambda case: case.name)
def test_resumed_training_ends_in_the_state_of_an_uninterrupted_one(case, gans):
    straight, resumed, saved = states(gans, case, "straight", "resumed", "saved")
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name
    assert any(not torch.equal(saved[name], value) for name, value in straight.items())
