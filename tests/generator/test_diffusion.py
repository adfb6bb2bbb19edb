"""The training loss on packed batches equals a loop over images, and decreases in training."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from cat_fast.errors import UserError
from cat_fast.generator import DiT, diffusion_loss, make_schedule, paper_schedule
from cat_fast.generator.diffusion import sequence_weights, total_weight
from cat_fast.packing import PackedSequence


def alone(model, schedule, part, t, noise, gamma):
    """Compute the error of one image from the formulas, without packing."""
    if isinstance(schedule, FlowMatchEulerDiscreteScheduler):
        sigma = t / 1000
        noisy, target, weight = (1 - sigma) * part.tokens + sigma * noise, noise - part.tokens, 1.0
    else:
        a = schedule.alphas_cumprod[t]
        noisy, target = a.sqrt() * part.tokens + (1 - a).sqrt() * noise, noise
        snr = a / (1 - a)
        weight = min(snr, gamma) / snr if gamma else 1.0
        if schedule.config.prediction_type == "v_prediction":
            target = a.sqrt() * noise - (1 - a).sqrt() * part.tokens
            weight = min(snr, gamma) / (snr + 1) if gamma else 1.0
    predicted = model(part.replace(tokens=noisy), t[None], part.label).sample
    return weight * torch.nn.functional.mse_loss(predicted, target)


@pytest.mark.parametrize("weighting", ["token", "image"])
@pytest.mark.parametrize(
    ("prediction", "gamma", "weighted"),
    [
        ("epsilon", 0.0, False),
        ("epsilon", 5.0, False),
        ("epsilon", 0.0, True),
        ("v_prediction", 0.0, False),
        ("v_prediction", 5.0, True),
        ("flow", 0.0, False),
    ],
)
def test_loss_equals_a_loop_over_images(tiny_dit, random_mix, weighting, prediction, gamma, weighted):
    packed = random_mix(seed=8)
    weights = torch.rand(len(packed)) + 0.5 if weighted else torch.ones(len(packed))
    schedule = make_schedule(prediction)
    got = diffusion_loss(
        tiny_dit,
        packed.replace(weight=weights) if weighted else packed,
        None,
        schedule,
        weighting=weighting,
        min_snr_gamma=gamma,
        generator=torch.Generator().manual_seed(3),
    )

    replay = torch.Generator().manual_seed(3)
    draw = torch.rand(len(packed), generator=replay) * 1000
    if prediction != "flow":
        replay = torch.Generator().manual_seed(3)
        draw = torch.randint(1000, (len(packed),), generator=replay)
    lengths = packed.cu_seqlens.diff()
    noises = torch.randn(packed.tokens.shape, generator=replay).split(lengths.tolist())
    parts = zip(packed.split(), draw, noises, strict=True)
    errors = torch.stack([alone(tiny_dit, schedule, part, t, noise, gamma) for part, t, noise in parts])
    counts = weights * (lengths if weighting == "token" else 1)

    assert torch.equal(got.timesteps, draw)
    torch.testing.assert_close(got.per_sequence, errors.detach())
    torch.testing.assert_close(got.loss, (errors * counts).sum() / counts.sum())
    given = packed.replace(weight=weights) if weighted else packed
    assert total_weight(given, weighting) == pytest.approx(counts.sum().item())
    torch.testing.assert_close(sequence_weights(given, weighting), counts.float())


def test_noise_levels_of_a_flow_depend_on_the_token_count_of_each_sequence(tiny_dit):
    """Against the formula: at 4 times as many tokens, the odds of noise double."""
    packed = PackedSequence.from_latents(
        [torch.randn(4, 16, 16), torch.randn(4, 8, 8), torch.randn(4, 4, 4)], [8, 16, 32], labels=[1, 2, 3]
    )  # 64, 16 and 4 tokens

    def timesteps(**options: float | str) -> torch.Tensor:
        source = torch.Generator().manual_seed(0)
        return (
            diffusion_loss(
                tiny_dit, packed, None, make_schedule("flow"), generator=source, **options
            ).timesteps.double()
            / 1000
        )

    plain, shifted = timesteps(), timesteps(noise_shift_tokens=16)
    torch.testing.assert_close(plain, torch.rand(3, generator=torch.Generator().manual_seed(0)).double())
    odds = (shifted / (1 - shifted)) / (plain / (1 - plain))
    torch.testing.assert_close(odds, torch.tensor([2.0, 1.0, 0.5]).double(), rtol=1e-4, atol=0)
    drawn = timesteps(timestep_draw="logit_normal")
    expected = torch.randn(3, generator=torch.Generator().manual_seed(0)).sigmoid()
    torch.testing.assert_close(drawn, expected.double())


@pytest.mark.parametrize("options", [{"noise_shift_tokens": 16}, {"timestep_draw": "logit_normal"}])
def test_options_of_a_flow_are_refused_for_other_schedules(tiny_dit, random_mix, options):
    with pytest.raises(UserError, match=f"{next(iter(options))}: expected .* flow"):
        diffusion_loss(tiny_dit, random_mix(0), None, paper_schedule(), **options)
    with pytest.raises(UserError, match=r"timestep_draw: expected 'uniform', .* got 'cosine'"):
        diffusion_loss(tiny_dit, random_mix(0), None, make_schedule("flow"), timestep_draw="cosine")


def test_weightings_differ_in_the_weight_of_image_sizes(tiny_dit):
    """Image weighting gives images equal weight; token weighting gives tokens equal weight."""
    packed = PackedSequence.from_latents(
        [torch.randn(4, 16, 16), torch.randn(4, 4, 4)], [8, 32], labels=[1, 2]
    )
    result = {
        name: diffusion_loss(
            tiny_dit,
            packed,
            None,
            paper_schedule(),
            weighting=name,
            generator=torch.Generator().manual_seed(0),
        )
        for name in ("token", "image")
    }
    large, small = result["token"].per_sequence
    torch.testing.assert_close(result["token"].loss, (64 * large + 4 * small) / 68)
    torch.testing.assert_close(result["image"].loss, (large + small) / 2)


def test_loss_is_reproducible_with_a_seeded_generator(tiny_dit, random_mix):
    packed = random_mix(seed=9)
    tiny_dit.train()
    losses = [
        diffusion_loss(
            tiny_dit, packed, None, paper_schedule(), generator=torch.Generator().manual_seed(s)
        ).loss
        for s in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_paper_schedule_has_the_published_values():
    config = paper_schedule().config
    assert (config.num_train_timesteps, config.beta_schedule) == (1000, "squaredcos_cap_v2")
    assert (config.prediction_type, config.timestep_spacing) == ("epsilon", "leading")
    assert (config.beta_start, config.beta_end) == (1e-4, 0.02)
    assert (config.clip_sample, config.clip_sample_range) == (True, 16)  # our addition


def test_linear_betas_are_those_of_the_original_dit():
    """Against the original's formula in float64."""
    betas = np.linspace(1e-4, 0.02, 1000)
    schedule = make_schedule("epsilon", "linear")
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=2e-4)
    assert schedule.config.prediction_type == "epsilon"
    assert make_schedule("v_prediction", "linear").config.prediction_type == "v_prediction"
    assert (
        make_schedule().config.beta_schedule == paper_schedule().config.beta_schedule == "squaredcos_cap_v2"
    )
    assert (
        make_schedule(beta_schedule="linear").config.clip_sample_range
        == paper_schedule().config.clip_sample_range
    )


def test_unknown_weightings_and_schedules_are_rejected(tiny_dit, random_mix):
    with pytest.raises(UserError, match=r"weighting: .* got 'pixel'"):
        diffusion_loss(tiny_dit, random_mix(0), None, paper_schedule(), weighting="pixel")
    with pytest.raises(UserError, match=r"prediction_type: .* got 'sample'"):
        diffusion_loss(tiny_dit, random_mix(0), None, DDPMScheduler(prediction_type="sample"))
    with pytest.raises(UserError, match=r"prediction: expected one of epsilon, .* got 'x0'"):
        make_schedule("x0")
    with pytest.raises(
        UserError, match=r"beta_schedule: expected one of squaredcos_cap_v2, linear, got 'cosine'"
    ):
        make_schedule("epsilon", "cosine")
    with pytest.raises(UserError, match="a flow has no betas"):
        make_schedule("flow", "linear")
    with pytest.raises(UserError, match="min_snr_gamma: expected 0 for a flow"):
        diffusion_loss(tiny_dit, random_mix(0), None, make_schedule("flow"), min_snr_gamma=5.0)


@pytest.mark.parametrize(
    ("prediction", "first_loss"), [("epsilon", 1.0), ("v_prediction", 1.0), ("flow", 2.0)]
)
def test_a_small_model_overfits_a_few_latents(prediction, first_loss):
    """Mixed ratios, constant latents: a fresh model predicts zero, and its loss decreases by 70 %."""
    torch.manual_seed(0)
    model = DiT(in_channels=4, hidden_size=96, depth=3, num_heads=2, num_classes=4, position_frame=8)
    sides = {8: 16, 16: 8, 32: 4}
    ratios = [8, 16, 32, 16] * 2
    latents = [torch.randn(4, 1, 1).expand(4, sides[r], sides[r]).contiguous() for r in ratios]
    packed = PackedSequence.from_latents(latents, ratios, labels=[0, 1, 2, 3] * 2)
    batch = PackedSequence.concat([packed] * 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(150):
        loss = diffusion_loss(model, batch, None, make_schedule(prediction), generator=generator).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(first_loss, rel=0.25)
    assert sum(losses[-20:]) / 20 < 0.3 * losses[0]
