"""Sampling: images depend only on their own request, and steps equal those of diffusers' schedulers."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from diffusers.schedulers import scheduling_ddpm

from cat_fast.errors import UserError
from cat_fast.generator import SampleRequest, make_schedule, paper_schedule
from cat_fast.generator.diffusion import load_schedule, shift_noise
from cat_fast.generator.noise import CounterNoise
from cat_fast.generator.sampling import pack_step, prepare
from cat_fast.generator.solvers import make_sampler, set_steps
from cat_fast.generator.step_pack import Filling
from cat_fast.packing import PackedSequence
from tests.generator.sampling_loop import sample

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
def test_sampling_equals_a_plain_loop_over_one_image(tiny_dit, sampler, guidance, monkeypatch):
    request = REQUESTS[0]
    (got,) = sample(tiny_dit, [request], paper_schedule(), sampler=sampler, steps=6, guidance=guidance)

    source = CounterNoise.from_seed(request.seed)
    solver = make_sampler(paper_schedule(), sampler)
    solver.set_timesteps(6)
    x = source.normal(0, (4, 8, 8))
    with torch.no_grad():
        for step, t in enumerate(solver.timesteps):
            drawn = source.normal(step + 1, (16, 16))
            monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, drawn=drawn, **__: drawn)
            packed = PackedSequence.from_latents([x], [request.ratio])
            labelled, null = (
                tiny_dit(packed, t.expand(1), torch.tensor([label])).sample for label in (request.label, 10)
            )
            noise = null + guidance * (labelled - null)
            tokens = solver.step(noise, t, packed.tokens).prev_sample
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
    x = CounterNoise.from_seed(request.seed).normal(0, (4, 8, 8))[None]
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
        config = SimpleNamespace(patch_size=2, in_channels=4, num_classes=10, text_dim=None)
        device = torch.device("cpu")

        def forward(self, packed, text, return_dict):
            alpha_bar = schedule.alphas_cumprod[packed.timestep.long()][packed.sequence_index(), None]
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


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_null_sequences_fill_a_pack_up_to_a_multiple_of_rows(tiny_dit, rows):
    scheduler = set_steps(paper_schedule(), "ddim", 4)
    states = [
        prepare(tiny_dit, request, scheduler, guidance=guidance)
        for request, guidance in zip(REQUESTS, (1.0, 3.0, 1.0, 1.5), strict=True)
    ]
    packed, text, parts = pack_step(tiny_dit, states, Filling(rows))
    assert text is None
    assert (len(packed) % rows, packed.num_tokens % rows) == (0, 0)
    assert packed.max_seqlen == 64 == max(packed.cu_seqlens.diff().tolist())
    assert [len(twins) for twins in parts] == [1, 2, 1, 2]
    for state, twins in zip(states, parts, strict=True):
        assert all(torch.equal(packed.tokens[twin], state.tokens) for twin in twins)
    bounds = packed.cu_seqlens.tolist()
    label = {begin: int(value) for begin, value in zip(bounds, packed.label, strict=False)}
    assert [[label[twin.start] for twin in twins] for twins in parts] == [[1], [7, 10], [3], [1, 10]]
    assert rows > 1 or len(packed) == 6


def test_noise_is_a_function_of_seed_and_counter():
    noise = CounterNoise.from_seed(5)
    one = noise.normal(3, (7, 11))
    noise.normal(0, (100,))
    assert torch.equal(noise.normal(3, (7, 11)), one)
    assert torch.equal(CounterNoise.from_seed(5).normal(3, (77,)).reshape(7, 11), one)
    seeds = (5, 6, 5 + 2**32, 2**63, 2**64 - 1, 2**64 - 2)
    draws = [CounterNoise.from_seed(seed).normal(3, (7, 11)) for seed in seeds]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(draws, 2))
    assert not torch.equal(noise.normal(4, (7, 11)), one)
    generator = torch.Generator().manual_seed(5)
    first, second = (CounterNoise.from_generator(generator) for _ in range(2))
    assert first == noise != second


def test_noise_is_standard_normal():
    values = torch.cat([CounterNoise.from_seed(seed).normal(1, (50_000,)) for seed in range(4)]).double()
    ordered = values.sort().values
    expected = torch.special.ndtr(ordered)
    uniform = torch.arange(1, len(values) + 1) / len(values)
    assert (expected - uniform).abs().max() < 1.63 / len(values) ** 0.5  # Kolmogorov-Smirnov at 1 %
    assert abs(torch.corrcoef(values.reshape(2, -1))[0, 1]) < 0.012


def test_invalid_requests_are_rejected(tiny_dit):
    with pytest.raises(UserError, match="scheduler: expected 'ddpm', 'ddim' or 'dpm\\+\\+', got 'euler'"):
        sample(tiny_dit, REQUESTS, paper_schedule(), sampler="euler")
    with pytest.raises(UserError, match=r"steps: expected 1 \.\. 1000, got 1001"):
        sample(tiny_dit, REQUESTS, paper_schedule(), steps=1001)
    with pytest.raises(UserError, match="fewer than 1000 distinct timesteps"):
        sample(tiny_dit, REQUESTS, paper_schedule(), sampler="dpm++", steps=1000)
    with pytest.raises(UserError, match="training mode"):
        sample(tiny_dit.train(), REQUESTS, paper_schedule())


def test_a_flow_is_sampled_with_euler_steps_only(tiny_dit):
    """Against the steps by hand: z - (sigma - next sigma) * predicted (noise - latent)."""
    schedule, request = make_schedule("flow"), REQUESTS[0]
    (got,) = sample(tiny_dit, [request], schedule, sampler="euler", steps=5, guidance=1.0)

    side = tiny_dit.config.patch_size * request.grid[0]
    noise = CounterNoise.from_seed(request.seed).normal(0, (tiny_dit.config.in_channels, side, side))
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
        noise = CounterNoise.from_seed(request.seed).normal(0, (4, side, side))
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
