"""Noise: the same bits on the host and by the integer arithmetic of a GPU, and few launches per step."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.shared.host_device import NoSynchronization
from cat_fast.generator import SampleRequest, make_schedule, noise
from cat_fast.generator.noise import CounterNoise, Draw, box_muller, draw_together, philox
from cat_fast.generator.sampling import draw_noise, prepare
from cat_fast.generator.solvers import set_steps

DRAWS = [
    Draw(CounterNoise.from_seed(seed), counter, shape)
    for seed, counter, shape in (
        (1, 0, (3, 5)),
        (2**63 + 3, 7, (64,)),
        (9, 2**40, (1,)),
        (2**64 - 1, 3, (7, 3)),
        (4, 2**64 - 1, (2, 9)),
    )
]


def test_words_of_a_device_are_those_of_numpy():
    device = noise._words(DRAWS, torch.device("cpu"))
    for draw, words, expected in zip(DRAWS, device, noise._words_on_host(DRAWS), strict=True):
        assert torch.equal(words[: 2 * draw.pairs], expected)


def test_draws_together_are_those_alone(monkeypatch):
    alone = [draw.noise.normal(draw.counter, draw.shape) for draw in DRAWS]
    together = draw_together(DRAWS, torch.device("cpu"))
    monkeypatch.setattr(noise, "_words_on_host", lambda draws: noise._words(draws, torch.device("cpu")))
    on_device = draw_together(DRAWS, torch.device("cpu"))
    for draw, one, other, another in zip(DRAWS, alone, together, on_device, strict=True):
        assert (one.shape, one.dtype) == (draw.shape, torch.float32)
        assert torch.equal(other, one)
        assert torch.equal(another, one)


def test_values_are_those_of_correctly_rounded_functions():
    """float64 errors of a unit in the last place vanish in float32, except at one value in 10^8."""
    source = CounterNoise.from_seed(6)
    count = 2**19
    words = source.philox(2).random_raw(2 * count)
    first, second = (((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53).reshape(2, -1)
    radius, angle = np.sqrt(-2.0 * np.log(first)), 2.0 * np.pi * second
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).astype(np.float32)
    got = source.normal(2, (2 * count,)).numpy()
    assert (got != expected).sum() <= 2
    np.testing.assert_allclose(got, expected, rtol=2e-7, atol=1e-12)


def test_extreme_words_give_finite_values():
    words = torch.tensor([0, -1, 2**62, -(2**62), -(2**63), 2**63 - 1, 2**11 - 1, 2**11])
    first, second = torch.cartesian_prod(words, words).unbind(1)
    cosines, sines = box_muller(first, second)
    assert torch.isfinite(cosines).all()
    assert torch.isfinite(sines).all()
    assert cosines.abs().max() < 8.7


def test_a_step_s_noise_is_drawn_once_for_all_images(tiny_dit):
    states = [
        prepare(tiny_dit, SampleRequest(label=1, ratio=16, grid=(4, 4), seed=seed), scheduler)
        for seed, scheduler in enumerate(
            [set_steps(make_schedule(), name, 5) for name in ("ddpm", "ddim", "ddpm")]
        )
    ]
    predictions = [torch.randn_like(state.tokens) for state in states]
    draw_noise(states)
    assert [state.noise is None for state in states] == [False, True, False]
    for state, prediction in zip(states, predictions, strict=True):
        expected = state.solver.next_draw(tuple(state.tokens.shape))
        if state.noise is not None:
            assert torch.equal(state.noise, draw_together([expected], torch.device("cpu"))[0])
            ahead = state.solver.advance(prediction, state.tokens, state.noise)
            state.solver.step -= 1
            assert torch.equal(ahead, state.solver.advance(prediction, state.tokens))


@pytest.mark.parametrize("images", [1, 16])
def test_launches_on_a_gpu_do_not_grow_with_the_images(images):
    with FakeTensorMode():
        block, draw, *key = (torch.empty(1000 * images, dtype=torch.int64, device="cuda") for _ in range(4))
        with NoSynchronization("cuda") as watched:
            words = philox(block, *key, draw).flatten()
            values, _ = box_muller(words[::2], words[1::2])
    assert (values.dtype, values.shape) == (torch.float32, (2000 * images,))
    assert sum(watched.launches.values()) < 420


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_bits_of_the_cpu():
    draws = [Draw(CounterNoise.from_seed(seed), seed, (16, 128, 128)) for seed in range(8)]
    for gpu, cpu in zip(*(draw_together(draws, torch.device(d)) for d in ("cuda", "cpu")), strict=True):
        assert torch.equal(gpu.cpu(), cpu)
