"""Re-rendering with both back ends: inversion, strength, guidance, size, ablations."""

import pytest
import torch

from benchmarks.shared.inversion_round_trip import STEPS, example_guides, model_error
from cat_fast.dual_token.rerender.open import open_backend
from cat_fast.dual_token.rerender.rerender import RerenderSettings, rerender
from cat_fast.dual_token.resize import resize
from cat_fast.errors import UserError


@pytest.fixture(params=["sd", "epsilon", "flow"])
def backend(request, stable_diffusion, cat_pipelines):
    if request.param == "sd":
        return open_backend(str(stable_diffusion), "cpu")
    return open_backend(str(cat_pipelines[request.param]), "cpu")


def inputs(backend, count=2):
    return example_guides(count), backend.text_target.states(["a red house", "a blue sky"][:count])


def settings(**changes):
    return RerenderSettings(**({"steps": 3} | changes))


def test_the_error_of_the_round_trip_falls_with_the_steps(backend, request):
    # A cosine schedule ends without signal: its last steps enlarge errors at any number of steps.
    strength = 0.8 if request.node.callspec.params["backend"] == "epsilon" else 1.0
    errors = [model_error(backend, example_guides(), steps, strength) for steps in STEPS]
    assert errors[0] > errors[1] > errors[2]


def test_inversion_ignores_the_condition_and_denoising_uses_it(backend, monkeypatch):
    guides, conditions = inputs(backend)
    calls = []
    real = type(backend).predict

    def recording(self, latents, timestep, given):
        calls.append((timestep, given is not None))
        return real(self, latents, timestep, given)

    monkeypatch.setattr(type(backend), "predict", recording)
    first = rerender(backend, guides, conditions, settings=settings())
    times = [time for time, _ in calls]
    assert [given for _, given in calls] == [False] * 3 + [True] * 3
    assert times[:3] == times[:2:-1]  # the same timesteps, upwards and downwards
    assert first.shape == (2, 3, *backend.default_size)
    other = rerender(backend, guides, conditions[::-1], settings=settings())
    assert (first - other).abs().max() > 1e-4


def test_batches_equal_single_images(backend):
    guides, conditions = inputs(backend)
    for mode in ("full", "semantic"):
        given = None if mode == "semantic" else guides
        both = rerender(backend, given, conditions, settings=settings(mode=mode), seeds=[5, 6])
        for i in range(2):
            own = None if given is None else given[i : i + 1]
            alone = rerender(backend, own, conditions[i : i + 1], settings=settings(mode=mode), seeds=[5 + i])
            torch.testing.assert_close(alone[0], both[i], rtol=1e-3, atol=1e-3)


def test_strength_and_modes(backend):
    guides, conditions = inputs(backend)
    enlarged = resize(guides, backend.default_size)
    assert torch.equal(rerender(backend, guides, None, settings=settings(mode="guide")), enlarged)
    coded = backend.decode(backend.encode(enlarged)).clamp(-1, 1)
    none = rerender(backend, guides, conditions, settings=settings(strength=0.0))
    torch.testing.assert_close(none, coded)
    steps = []
    rerender(
        backend,
        guides,
        conditions,
        settings=settings(steps=10, strength=0.3),
        on_step=lambda: steps.append(1),
    )
    assert len(steps) == 6
    unconditioned = rerender(backend, guides, None, settings=settings(mode="unconditioned"))
    full = rerender(backend, guides, conditions, settings=settings())
    assert (unconditioned - full).abs().max() > 1e-4
    semantic = [
        rerender(backend, None, conditions, settings=settings(mode="semantic"), seeds=seeds)
        for seeds in ([0, 1], [0, 1], [2, 3])
    ]
    assert torch.equal(semantic[0], semantic[1])
    assert (semantic[0] - semantic[2]).abs().max() > 1e-4


def test_guidance_interpolates_predictions(backend):
    guides, conditions = inputs(backend, 1)
    one, two = (
        rerender(backend, guides, conditions, settings=settings(guidance_scale=scale)) for scale in (1.0, 0.0)
    )
    unconditioned = rerender(backend, guides, None, settings=settings(mode="unconditioned"))
    torch.testing.assert_close(two, unconditioned, rtol=1e-4, atol=1e-4)
    assert (one - two).abs().max() > 1e-5


def test_the_size_is_chosen_at_decoding(backend):
    guides, conditions = inputs(backend, 1)
    height, width = backend.default_size
    image = rerender(backend, guides, conditions, (height, 2 * width), settings())
    assert image.shape == (1, 3, height, 2 * width)


def test_paper_equations(stable_diffusion, cat_pipelines):
    backend = open_backend(str(stable_diffusion), "cpu")
    guides, conditions = inputs(backend)
    found = [
        rerender(backend, guides, conditions, settings=settings(equations="paper"), seeds=seeds)
        for seeds in ([0, 1], [0, 1], [2, 3])
    ]
    assert torch.equal(found[0], found[1])
    assert (found[0] - found[2]).abs().max() > 1e-5
    flow = open_backend(str(cat_pipelines["flow"]), "cpu")
    with pytest.raises(UserError, match="this model is a flow"):
        rerender(flow, guides, inputs(flow)[1], settings=settings(equations="paper"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"strength": 1.5}, "strength: expected 0 to 1"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"fixed_point": -1}, "fixed_point"),
        ({"equations": "x"}, "equations: expected ddim, paper"),
        ({"mode": "x"}, "mode: expected full, semantic"),
    ],
)
def test_invalid_settings_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        settings(**changes)


def test_missing_inputs_are_refused(stable_diffusion):
    backend = open_backend(str(stable_diffusion), "cpu")
    guides, conditions = inputs(backend)
    with pytest.raises(UserError, match="guides: the mode full needs"):
        rerender(backend, None, conditions)
    with pytest.raises(UserError, match="conditions: the mode full needs"):
        rerender(backend, guides, None)
    with pytest.raises(UserError, match="as many guides as conditions"):
        rerender(backend, guides, conditions[:1])
    with pytest.raises(UserError, match="seeds: expected one per image"):
        rerender(backend, guides, conditions, settings=settings(), seeds=[1])
    with pytest.raises(UserError, match="multiple of 4 px"):
        rerender(backend, guides, conditions, (17, 16))
