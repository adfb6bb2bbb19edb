"""Sampling: images depend only on their own request, and steps equal those of diffusers' schedulers."""

import itertools

import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.generator import SampleRequest, make_schedule, paper_schedule, sample
from cat_fast.generator.diffusion import load_schedule, shift_noise
from cat_fast.generator.sampling import make_sampler
from cat_fast.packing import PackedSequence

REQUESTS = [
    SampleRequest(label=1, ratio=16, grid=(4, 4), seed=11),
    SampleRequest(label=7, ratio=32, grid=(2, 2), seed=12),
    SampleRequest(label=3, ratio=8, grid=(8, 8), seed=13),
    SampleRequest(label=1, ratio=16, grid=(4, 4), seed=14),
]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_a_sample_does_not_depend_on_its_neighbours(tiny_dit, sampler):
    options = {"schedule": paper_schedule(), "sampler": sampler, "steps": 8, "guidance": 2.0}
    together = sample(tiny_dit, REQUESTS, **options)
    assert [tuple(latent.shape) for latent in together] == [(4, 8, 8), (4, 4, 4), (4, 16, 16), (4, 8, 8)]
    reordered = sample(tiny_dit, REQUESTS[::-1], **options)[::-1]
    for request, latent, moved in zip(REQUESTS, together, reordered, strict=True):
        (alone,) = sample(tiny_dit, [request], **options)
        torch.testing.assert_close(latent, alone, atol=1e-4 * float(alone.abs().max()), rtol=0)
        torch.testing.assert_close(moved, alone, atol=1e-4 * float(alone.abs().max()), rtol=0)
    assert not torch.allclose(together[0], together[3], atol=0.1)  # same request, another seed


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_equals_a_plain_loop_over_one_image(tiny_dit, sampler, guidance):
    request = REQUESTS[0]
    (got,) = sample(tiny_dit, [request], paper_schedule(), sampler=sampler, steps=6, guidance=guidance)

    generator = torch.Generator().manual_seed(request.seed)
    solver = make_sampler(paper_schedule(), sampler)
    solver.set_timesteps(6)
    x = torch.randn(4, 8, 8, generator=generator)
    with torch.no_grad():
        for t in solver.timesteps:
            packed = PackedSequence.from_latents([x], [request.ratio])
            labelled, null = (
                tiny_dit(packed, t.expand(1), torch.tensor([label])).sample for label in (request.label, 10)
            )
            noise = null + guidance * (labelled - null)
            tokens = solver.step(noise, t, packed.tokens, generator=generator).prev_sample
            (x,) = packed.replace(tokens=tokens).to_latents()
    torch.testing.assert_close(got, x, atol=1e-4 * float(x.abs().max()), rtol=0)


def original_guidance(labelled, null, scale):
    """Guide as facebookresearch/DiT (`forward_with_cfg`), given (B, C, H, W) of both halves."""
    model_out = torch.cat([labelled, null])
    eps, rest = model_out[:, :3], model_out[:, 3:]
    cond_eps, uncond_eps = torch.split(eps, len(eps) // 2, dim=0)
    half_eps = uncond_eps + scale * (cond_eps - uncond_eps)
    return torch.cat([torch.cat([half_eps, half_eps]), rest], dim=1).chunk(2)[0]


def test_guidance_of_three_channels_is_that_of_the_original_dit(tiny_dit):
    request, schedule = REQUESTS[0], make_schedule("epsilon", "linear")
    options = {"sampler": "ddim", "steps": 4, "guidance": 4.0}
    (got,) = sample(tiny_dit, [request], schedule, guidance_channels=3, **options)

    solver = make_sampler(schedule, "ddim")
    solver.set_timesteps(4)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(request.seed))
    with torch.no_grad():
        for t in solver.timesteps:
            packed = PackedSequence.from_latents([x[0]], [request.ratio])
            labelled, null = (
                packed.replace(
                    tokens=tiny_dit(packed, t.expand(1), torch.tensor([label])).sample
                ).to_latents()[0]
                for label in (request.label, 10)
            )
            x = solver.step(original_guidance(labelled[None], null[None], 4.0), t, x).prev_sample
    torch.testing.assert_close(got, x[0], atol=1e-4 * float(x.abs().max()), rtol=0)

    (every,) = sample(tiny_dit, [request], schedule, **options)
    assert torch.equal(every, sample(tiny_dit, [request], schedule, guidance_channels=4, **options)[0])
    assert not torch.allclose(every, got, atol=1e-3)


@pytest.mark.parametrize("count", [0, -1, 5])
def test_guidance_of_channels_that_the_latents_lack_is_refused(tiny_dit, count):
    with pytest.raises(UserError, match=rf"guidance_channels: expected 1 \.\. 4, .* got {count}"):
        sample(tiny_dit, REQUESTS[:1], paper_schedule(), steps=2, guidance_channels=count)


def test_a_model_is_not_sampled_with_other_betas_than_its_own(make_dit):
    linear, cosine = make_dit(beta_schedule="linear"), make_dit(beta_schedule="squaredcos_cap_v2")
    sample(linear, REQUESTS[:1], make_schedule("epsilon", "linear"), steps=1)
    sample(cosine, REQUESTS[:1], paper_schedule(), steps=1)
    with pytest.raises(UserError, match=r"trained with linear betas, the scheduler has squaredcos_cap_v2"):
        sample(linear, REQUESTS[:1], paper_schedule(), steps=1)
    with pytest.raises(UserError, match=r"trained with squaredcos_cap_v2 betas, the scheduler has none"):
        sample(cosine, REQUESTS[:1], make_schedule("flow"), sampler="euler", steps=1)


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [("ddpm", 25), ("ddpm", 1000), ("ddim", 25), ("ddim", 1000), ("dpm++", 25), ("dpm++", 250)],
)
def test_solvers_recover_a_distribution_with_known_noise(sampler, steps):
    """If all data is one latent, the exact noise is known, and every solver must converge to that latent.

    The prediction has a small error, like a trained model's. The nearly signal-free end of the schedule would
    magnify it a thousandfold.
    """
    target = 0.7
    schedule = paper_schedule()

    class Oracle(torch.nn.Module):
        config = type("config", (), {"patch_size": 2, "in_channels": 4, "num_classes": 10})
        device = torch.device("cpu")

        def forward(self, packed, text, return_dict):
            alpha_bar = schedule.alphas_cumprod[packed.timestep][packed.sequence_index(), None]
            exact = (packed.tokens - alpha_bar.sqrt() * target) / (1 - alpha_bar).sqrt()
            return (exact + 0.01 * torch.sin(31 * packed.tokens),)

    for latent in sample(Oracle().eval(), REQUESTS, schedule, sampler=sampler, steps=steps):
        torch.testing.assert_close(latent, torch.full_like(latent, target), atol=0.03, rtol=0)


@pytest.mark.parametrize("steps", [5, 25, 200])
def test_dpm_solver_starts_where_latents_contain_enough_signal(steps):
    """It cannot clip: at the schedule's end, where signal over noise is 5e-5, errors would be magnified."""
    schedule = paper_schedule()
    solver = make_sampler(schedule, "dpm++")
    solver.set_timesteps(steps)
    first = schedule.alphas_cumprod[solver.timesteps[0]].double()
    assert (first / (1 - first)).sqrt().item() == pytest.approx(0.08, rel=0.05)


def test_on_step_is_called_once_per_step(tiny_dit):
    ticks = []
    sample(tiny_dit, REQUESTS[:1], paper_schedule(), steps=5, on_step=lambda *_: ticks.append(1))
    assert len(ticks) == 5


def test_invalid_requests_are_rejected(tiny_dit):
    with pytest.raises(UserError, match="scheduler: expected 'ddpm', 'ddim' or 'dpm\\+\\+', got 'euler'"):
        sample(tiny_dit, REQUESTS, paper_schedule(), sampler="euler")
    with pytest.raises(UserError, match=r"steps: expected 1 \.\. 1000, got 1001"):
        sample(tiny_dit, REQUESTS, paper_schedule(), steps=1001)
    with pytest.raises(UserError, match="fewer than 1000 distinct timesteps"):
        sample(tiny_dit, REQUESTS, paper_schedule(), sampler="dpm++", steps=1000)
    with pytest.raises(UserError, match="requests: expected at least one"):
        sample(tiny_dit, [], paper_schedule())
    with pytest.raises(UserError, match="training mode"):
        sample(tiny_dit.train(), REQUESTS, paper_schedule())


def test_a_flow_is_sampled_with_euler_steps_only(tiny_dit):
    """Against the steps by hand: z - (sigma - next sigma) * predicted (noise - latent)."""
    schedule, request = make_schedule("flow"), REQUESTS[0]
    (got,) = sample(tiny_dit, [request], schedule, sampler="euler", steps=5, guidance=1.0)

    side = tiny_dit.config.patch_size * request.grid[0]
    noise = torch.randn(
        tiny_dit.config.in_channels, side, side, generator=torch.Generator().manual_seed(request.seed)
    )
    packed = PackedSequence.from_latents([noise], [request.ratio], labels=[request.label])
    solver = make_sampler(schedule, "euler")
    solver.set_timesteps(5)
    for t, sigma, following in zip(solver.timesteps, solver.sigmas, solver.sigmas[1:], strict=False):
        with torch.no_grad():
            velocity = tiny_dit(packed.replace(timestep=t[None])).sample
        packed = packed.replace(tokens=packed.tokens + (following - sigma) * velocity)
    torch.testing.assert_close(got, packed.to_latents()[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="expected 'euler', because this model was trained as a flow"):
        sample(tiny_dit, [request], schedule, sampler="ddim")


def test_a_shifted_flow_takes_steps_at_the_noise_levels_of_each_length(make_dit):
    """Against Euler steps by hand at the shifted levels, for images of three lengths in one batch."""
    model, schedule = make_dit(noise_shift_tokens=16), make_schedule("flow")
    together = sample(model, REQUESTS, schedule, sampler="euler", steps=4, guidance=1.0)
    plain = make_sampler(schedule, "euler")
    plain.set_timesteps(4)
    for request, got in zip(REQUESTS, together, strict=True):
        levels = shift_noise(plain.sigmas[:-1], torch.full((4,), request.num_tokens), 16)
        levels = torch.cat([levels, torch.zeros(1)])
        side = 2 * request.grid[0]
        noise = torch.randn(4, side, side, generator=torch.Generator().manual_seed(request.seed))
        packed = PackedSequence.from_latents([noise], [request.ratio], labels=[request.label])
        for sigma, following in itertools.pairwise(levels):
            with torch.no_grad():
                velocity = model(packed.replace(timestep=1000 * sigma[None])).sample
            packed = packed.replace(tokens=packed.tokens + (following - sigma) * velocity)
        torch.testing.assert_close(got, packed.to_latents()[0], rtol=1e-3, atol=1e-4)


def test_guidance_per_ratio_equals_each_image_with_its_own_scale(tiny_dit):
    scales = {8: 1.0, 16: 3.0, 32: 5.0}
    options = {"schedule": paper_schedule(), "sampler": "ddim", "steps": 4}
    together = sample(tiny_dit, REQUESTS, guidance=scales, **options)
    for request, latent in zip(REQUESTS, together, strict=True):
        (alone,) = sample(tiny_dit, [request], guidance=scales[request.ratio], **options)
        torch.testing.assert_close(latent, alone, atol=1e-4 * float(alone.abs().max()), rtol=0)
    with pytest.raises(UserError, match=r"guidance: expected a scale for 16x, got \{8: 1.0\}"):
        sample(tiny_dit, REQUESTS, guidance={8: 1.0}, **options)


@pytest.mark.parametrize(
    "arguments",
    [("epsilon",), ("v_prediction",), ("flow",), ("epsilon", "linear"), ("v_prediction", "linear")],
)
def test_saved_schedules_load_with_their_class_prediction_and_betas(tmp_path, arguments):
    schedule = make_schedule(*arguments)
    schedule.save_pretrained(tmp_path)
    loaded = load_schedule(tmp_path)
    assert type(loaded) is type(schedule)
    for name in ("prediction_type", "beta_schedule"):
        assert loaded.config.get(name) == schedule.config.get(name)
    with pytest.raises(UserError, match="not the config of a DDPMScheduler"):
        load_schedule(tmp_path / "nowhere")
