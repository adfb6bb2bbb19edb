"""The training loss on packed batches against a loop over pictures, and that it trains."""

import pytest
import torch
from diffusers import DDPMScheduler

from cat_fast.errors import UserError
from cat_fast.generator import DiT, epsilon_loss, paper_schedule
from cat_fast.packing import PackedSequence


@pytest.mark.parametrize("weighting", ["token", "image"])
def test_loss_equals_a_loop_over_pictures(tiny_dit, random_mix, weighting):
    packed = random_mix(seed=8)
    schedule = paper_schedule()
    got = epsilon_loss(
        tiny_dit, packed, None, schedule, weighting=weighting, generator=torch.Generator().manual_seed(3)
    )

    replay = torch.Generator().manual_seed(3)
    timesteps = torch.randint(1000, (len(packed),), generator=replay)
    noise = torch.randn(packed.tokens.shape, generator=replay).split(
        [part.num_tokens for part in packed.split()]
    )
    errors, tokens = [], []
    for part, t, eps in zip(packed.split(), timesteps, noise, strict=True):
        alpha_bar = schedule.alphas_cumprod[t]
        noisy = alpha_bar.sqrt() * part.tokens + (1 - alpha_bar).sqrt() * eps
        predicted = tiny_dit(part.replace(tokens=noisy), t[None], part.label)
        errors.append(torch.nn.functional.mse_loss(predicted, eps))
        tokens.append(part.num_tokens)
    errors, tokens = torch.stack(errors), torch.tensor(tokens)

    assert torch.equal(got.timesteps, timesteps)
    torch.testing.assert_close(got.per_sequence, errors.detach())
    if weighting == "token":
        expected, weight = (errors * tokens).sum() / tokens.sum(), int(tokens.sum())
    else:
        expected, weight = errors.mean(), len(packed)
    torch.testing.assert_close(got.loss, expected)
    assert got.weight == weight


def test_the_weightings_differ_exactly_where_sizes_do(tiny_dit):
    """Image weighting lifts a small picture's tokens; token weighting treats all tokens alike."""
    packed = PackedSequence.from_latents(
        [torch.randn(4, 16, 16), torch.randn(4, 4, 4)], [8, 32], labels=[1, 2]
    )
    result = {
        name: epsilon_loss(
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


def test_one_generator_repeats_the_loss(tiny_dit, random_mix):
    packed = random_mix(seed=9)
    tiny_dit.train()
    losses = [
        epsilon_loss(
            tiny_dit, packed, None, paper_schedule(), generator=torch.Generator().manual_seed(s)
        ).loss
        for s in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_the_schedule_is_the_published_one():
    config = paper_schedule().config
    assert (config.num_train_timesteps, config.beta_schedule) == (1000, "squaredcos_cap_v2")
    assert (config.prediction_type, config.timestep_spacing) == ("epsilon", "leading")
    assert (config.beta_start, config.beta_end) == (1e-4, 0.02)


def test_unknown_weighting_and_foreign_schedules_are_refused(tiny_dit, random_mix):
    with pytest.raises(UserError, match="weighting 'pixel'"):
        epsilon_loss(tiny_dit, random_mix(0), None, paper_schedule(), weighting="pixel")
    with pytest.raises(UserError, match="prediction_type 'sample'"):
        epsilon_loss(tiny_dit, random_mix(0), None, DDPMScheduler(prediction_type="sample"))


def test_a_small_model_learns_a_few_latents():
    """Mixed ratios, smooth latents: the loss falls from about 1 (a fresh model predicts zero) below 0.3."""
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
        loss = epsilon_loss(model, batch, None, paper_schedule(), generator=generator).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.1)
    assert sum(losses[-20:]) / 20 < 0.3
