"""Scale of latents: each normalization and its inverse; statistics in which every image weighs alike."""

import json

import pytest
import torch

from cat_fast.data.latents.moments import Moments
from cat_fast.data.latents.scale import LatentScale, read_normalization
from cat_fast.errors import UserError

RATIOS = (8, 16, 32)


def latents(count=9):
    """Return (ratio, latent) pairs whose mean and deviation differ by ratio and channel."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        ratio = RATIOS[i % 3]
        side = 64 // ratio
        values = torch.randn(3, side, side, generator=generator)
        yield ratio, ratio / 8 + torch.tensor([1.0, 2.0, 5.0]).view(3, 1, 1) * values * ratio / 16


def test_every_image_weighs_alike_whatever_its_size():
    """Pooled by values, the large image would weigh 64 times as much as the small one."""
    moments = Moments.of([torch.zeros(1, 16, 16), torch.ones(1, 2, 2)])
    assert (moments.count, moments.mean, moments.std) == (2, [0.5], [0.5])
    spread = torch.tensor([-3.0, 3.0]).view(1, 1, 2)
    assert Moments.of([spread, torch.zeros(1, 8, 8)]).std == pytest.approx([(9 / 2) ** 0.5])


def test_merged_moments_are_those_of_all_images():
    everything = [latent for _, latent in latents()]
    merged = Moments.merge(Moments.of(part) for part in (everything[:2], everything[2:3], everything[3:]))
    means = torch.stack([latent.double().mean((1, 2)) for latent in everything])
    squares = torch.stack([latent.double().square().mean((1, 2)) for latent in everything]).mean(0)
    assert merged.count == len(everything)
    assert merged.mean == pytest.approx(means.mean(0).tolist(), rel=1e-12)
    assert merged.std == pytest.approx((squares - means.mean(0) ** 2).sqrt().tolist(), rel=1e-9)


@pytest.mark.parametrize("normalization", ["per_channel", "per_ratio"])
def test_normalized_latents_have_mean_0_and_deviation_1(normalization):
    scale = LatentScale.normalizing(Moments.by_group(latents()), normalization)
    scaled = [(ratio, scale.apply(latent, ratio)) for ratio, latent in latents()]
    groups = {"per_channel": [RATIOS], "per_ratio": [(ratio,) for ratio in RATIOS]}[normalization]
    for group in groups:
        found = Moments.of(latent for ratio, latent in scaled if ratio in group)
        assert found.mean == pytest.approx([0] * 3, abs=1e-6)
        assert found.std == pytest.approx([1] * 3, rel=1e-6)
    for (ratio, latent), (_, original) in zip(scaled, latents(), strict=True):
        torch.testing.assert_close(scale.undo(latent, ratio), original, atol=1e-5, rtol=1e-5)


def test_a_constant_channel_is_shifted_only():
    (factor,) = LatentScale.normalizing({8: Moments.of([torch.ones(1, 2, 2)])}, "per_channel").scaling_factor
    assert factor == 1


@pytest.mark.parametrize(
    "scale",
    [
        LatentScale(0.5, 2.0),
        LatentScale([0.5, 0.0, 1.0], [1.0, 2.0, 4.0]),
        LatentScale({"8": [1.0, 2.0, 3.0], "16": [0.0] * 3}, {"8": [2.0] * 3, "16": [1.0, 2.0, 4.0]}),
    ],
)
def test_a_scale_survives_json_and_is_undone(scale):
    stored = LatentScale(**json.loads(json.dumps(scale.to_json())))
    stored.check((8, 16), 3)
    latent = torch.randn(2, 3, 4, 4)
    for ratio in (8, 16):
        scaled = scale.apply(latent, ratio)
        assert torch.equal(stored.apply(latent, ratio), scaled)
        torch.testing.assert_close(stored.undo(scaled, ratio), latent)
    if isinstance(scale.shift_factor, dict):
        torch.testing.assert_close(scale.apply(latent, 16)[:, 2], 4 * latent[:, 2])
        torch.testing.assert_close(scale.apply(latent, 8)[:, 2], 2 * (latent[:, 2] - 3))


def test_the_identity_is_stored_as_null():
    assert LatentScale().to_json() is LatentScale([0.0, 0.0], [1.0, 1.0]).to_json() is None
    assert LatentScale(0.0, 0.5).to_json() == {"shift_factor": 0.0, "scaling_factor": 0.5}


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (LatentScale([0.0] * 4), "shift_factor: expected 3 values, one per channel, got 4"),
        (LatentScale(0.0, [1.0, 0.0, 1.0]), "scaling_factor: expected positive values"),
        (LatentScale(float("nan")), "shift_factor: expected finite values"),
        (LatentScale(0.0, float("inf")), "scaling_factor: expected positive values"),
        (
            LatentScale({"8": [0.0] * 3}),
            "shift_factor: expected values for the ratios 8, 16, got those for 8",
        ),
        (LatentScale(0.0, {"8": [1.0] * 3, "16": [1.0]}), None),
        (LatentScale(0.0, {"8": [1.0] * 3, "16": [1.0] * 2}), "scaling_factor: expected 3 values"),
    ],
)
def test_scales_that_do_not_fit_the_model_are_refused(scale, message):
    if message is None:
        scale.check((8, 16), 3)
        return
    with pytest.raises(UserError, match=message):
        scale.check((8, 16), 3)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("none", "none"),
        ("per_channel", "per_channel"),
        ("per_ratio", "per_ratio"),
        (True, "per_channel"),
        (False, "none"),
        ("True", "per_channel"),
        ("false", "none"),
    ],
)
def test_booleans_are_read_as_normalizations(value, expected):
    assert read_normalization(value) == expected


@pytest.mark.parametrize("value", ["", "channel", "None ", 1])
def test_unknown_normalizations_are_refused(value):
    with pytest.raises(
        UserError, match=r"data\.normalized: expected one of none, per_channel, per_ratio, got"
    ):
        read_normalization(value, "data.normalized")
