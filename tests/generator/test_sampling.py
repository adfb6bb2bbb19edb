"""Sampling: images depend only on their own request, and steps equal those of diffusers' schedulers."""

import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.generator import SampleRequest, make_schedule, paper_schedule, sample
from cat_fast.generator.diffusion import load_schedule
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


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_saved_schedules_load_with_their_class_and_prediction(tmp_path, prediction):
    schedule = make_schedule(prediction)
    schedule.save_pretrained(tmp_path)
    loaded = load_schedule(tmp_path)
    assert type(loaded) is type(schedule)
    assert loaded.config.get("prediction_type") == schedule.config.get("prediction_type")
    with pytest.raises(UserError, match="not the config of a DDPMScheduler"):
        load_schedule(tmp_path / "nowhere")
