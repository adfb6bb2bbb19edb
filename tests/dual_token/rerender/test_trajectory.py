"""Steps between noise levels: against diffusers, the paper's equations, and exact predictions."""

import pytest
import torch
from diffusers import DDIMInverseScheduler

from benchmarks.shared.inversion_round_trip import exact_error, stable_diffusions_schedule
from cat_fast.dual_token.rerender.trajectory import make_trajectory
from cat_fast.errors import UserError
from cat_fast.generator.diffusion import make_schedule


def test_the_round_trip_of_unit_gaussian_data_errs_less_than_two_per_mille_at_50_steps():
    errors = [exact_error(stable_diffusions_schedule(), "epsilon", steps) for steps in (20, 50, 200)]
    assert errors[1] < 0.002
    assert errors[0] > errors[1] > errors[2]


def test_the_prediction_at_the_source_timestep_errs_several_per_cent():
    found = exact_error(stable_diffusions_schedule(), "epsilon", 50, source_timestep=True)
    assert 0.01 < found < 0.2


@pytest.mark.parametrize("shift", [None, 2.0])
def test_a_flows_error_falls_with_the_steps(shift):
    schedule = make_schedule("flow")
    errors = [exact_error(schedule, "flow", steps, shift) for steps in (20, 50, 200)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


@pytest.mark.parametrize(("schedule", "kind"), [("ddim", "epsilon"), ("flow", "flow")])
def test_fixed_point_iterations_make_the_directions_inverse(schedule, kind):
    made = stable_diffusions_schedule() if schedule == "ddim" else make_schedule("flow")
    errors = [exact_error(made, kind, 20, fixed_point=count) for count in (0, 1, 6)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


def test_steps_are_diffusers():
    schedule = stable_diffusions_schedule()
    trajectory = make_trajectory(schedule, 10)
    inverse, forward = DDIMInverseScheduler.from_config(schedule.config), schedule
    inverse.set_timesteps(10)
    forward.set_timesteps(10)
    torch.manual_seed(0)
    z, prediction = torch.randn(2, 4), torch.randn(2, 4)
    for i, (up, down) in enumerate(zip(inverse.timesteps, forward.timesteps.flip(0), strict=True), 1):
        assert trajectory.timestep(i) == float(up) == float(down)
        assert torch.equal(trajectory.invert(z, prediction, i), inverse.step(prediction, up, z).prev_sample)
        expected = forward.step(prediction, down, z).prev_sample
        torch.testing.assert_close(trajectory.denoise(z, prediction, i, None), expected)


def test_an_inversion_undoes_a_denoising_step_with_the_same_prediction():
    torch.manual_seed(0)
    z, prediction = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    for schedule in (stable_diffusions_schedule(), make_schedule("flow"), make_schedule("v_prediction")):
        trajectory = make_trajectory(schedule, 10)
        if schedule.config.get("prediction_type") == "v_prediction":
            continue  # its prediction mixes noise and clean latent, so that the two differ
        for i in range(1, 11):
            back = trajectory.denoise(trajectory.invert(z, prediction, i), prediction, i, None)
            torch.testing.assert_close(back, z, rtol=1e-4, atol=1e-4)


def test_paper_equations_as_printed():
    schedule = stable_diffusions_schedule()
    trajectory = make_trajectory(schedule, 10, "paper")
    products = schedule.alphas_cumprod.double()
    torch.manual_seed(0)
    z, e, noise = (torch.randn(6, dtype=torch.float64) for _ in range(3))
    t, before = int(trajectory.timestep(4)), int(trajectory.timestep(3))
    alpha = products[t] / products[before]
    expected = alpha.sqrt() * z + (1 - alpha).sqrt() * e  # equation 9
    torch.testing.assert_close(trajectory.invert(z, e, 4), expected, rtol=1e-5, atol=1e-5)
    # equation 10: f is the mean of DDPM's posterior, in the form with the predicted noise
    mean = (z - (1 - alpha) / (1 - products[t]).sqrt() * e) / alpha.sqrt()
    deviation = ((1 - products[before]) / (1 - products[t]) * (1 - alpha)).sqrt()
    found = trajectory.denoise(z, e, 4, noise)
    torch.testing.assert_close(found, mean + deviation * noise, rtol=1e-4, atol=1e-4)
    assert trajectory.adds_noise
    last = trajectory.denoise(z, e, 1, noise)
    assert torch.equal(last, trajectory.denoise(z, e, 1, torch.zeros_like(noise)))


def test_impossible_trajectories_are_refused():
    with pytest.raises(UserError, match=r"steps: expected 1 .. 1000, got 0"):
        make_trajectory(stable_diffusions_schedule(), 0)
    with pytest.raises(UserError, match="equations: expected ddim or paper"):
        make_trajectory(stable_diffusions_schedule(), 10, "ddpm")
    with pytest.raises(UserError, match="this model is a flow"):
        make_trajectory(make_schedule("flow"), 10, "paper")
