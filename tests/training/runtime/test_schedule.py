"""Learning rate, weight averaging and randomness as functions of the step alone."""

import math

import pytest
import torch
from torch import nn

from cat_fast.training.config.settings import ScheduleConfig
from cat_fast.training.runtime.ema import EMA
from cat_fast.training.runtime.engine import learning_rate
from cat_fast.training.runtime.seeding import seed_step


def rates(config: ScheduleConfig, base: float = 1.0) -> list[float]:
    return [learning_rate(base, config, step) for step in range(config.total_steps + 3)]


def test_constant_schedule_warms_up_linearly_and_stays():
    config = ScheduleConfig(total_steps=6, warmup_steps=4, kind="constant")
    assert rates(config, base=2.0) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_cosine_schedule_falls_from_the_full_rate_to_min_ratio_and_stays_there():
    config = ScheduleConfig(total_steps=6, warmup_steps=2, kind="cosine", min_ratio=0.2)
    half = 0.2 + 0.8 * 0.5
    high, low = (0.2 + 0.8 * 0.5 * (1 + sign * math.sqrt(0.5)) for sign in (1, -1))
    assert rates(config) == pytest.approx([0.5, 1.0, 1.0, high, half, low, 0.2, 0.2, 0.2])


def test_without_warm_up_the_first_step_has_the_full_rate():
    for kind in ("constant", "cosine"):
        assert learning_rate(3e-4, ScheduleConfig(kind=kind), 0) == 3e-4


def test_a_warm_up_as_long_as_the_run_ends_at_the_full_rate():
    config = ScheduleConfig(total_steps=4, warmup_steps=4, kind="cosine")
    assert rates(config)[:4] == [0.25, 0.5, 0.75, 1.0]


class Walk(nn.Module):
    """A parameter with a known value at each step."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=dtype))

    def to_step(self, step: int) -> torch.Tensor:
        value = torch.tensor([step, -2.0 * step, step**2])
        with torch.no_grad():
            self.weight.copy_(value)
        return value.double()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_average_is_the_weighted_sum_of_all_values_seen(decay):
    model = Walk()
    start = model.to_step(1)
    ema = EMA(model, decay)
    values = []
    for step in range(2, 14):
        values.append(model.to_step(step))
        ema.update()
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(len(values))]
    expected = math.prod(decays) * start
    for n, value in enumerate(values):
        expected = expected + (1 - decays[n]) * math.prod(decays[n + 1 :]) * value
    torch.testing.assert_close(ema.averaged["weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_the_average_is_kept_in_float32_and_apart_from_the_model():
    model = Walk(torch.bfloat16)
    ema = EMA(model, 0.999)
    for _ in range(50):
        model.to_step(1)
        ema.update()
    assert ema.averaged["weight"].dtype == torch.float32
    with torch.no_grad():
        model.weight.zero_()
    assert ema.averaged["weight"].abs().min() > 0.5
    other = Walk()
    ema.copy_to(other)
    assert torch.equal(other.weight, ema.averaged["weight"])


def test_a_saved_and_loaded_average_continues_exactly(tmp_path):
    model = Walk()
    uninterrupted = EMA(model, 0.9)
    for step in range(4):
        model.to_step(step)
        uninterrupted.update()
    uninterrupted.save(tmp_path / "ema.safetensors")
    resumed = EMA(Walk(), 0.9)
    resumed.load(tmp_path / "ema.safetensors", uninterrupted.updates)
    resumed.module = model
    for step in range(4, 8):
        model.to_step(step)
        uninterrupted.update()
        resumed.update()
    assert torch.equal(resumed.averaged["weight"], uninterrupted.averaged["weight"])


def torch_numbers(*triple: int) -> list[float]:
    seed_step(*triple)
    return torch.rand(4).tolist()


def test_a_step_has_its_own_numbers_whatever_came_before():
    expected = torch_numbers(3, 14, 1)
    torch.manual_seed(99)
    torch.rand(7)
    assert torch_numbers(3, 14, 1) == expected


def test_seed_step_and_rank_each_change_every_number():
    triples = [(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)]
    drawn = [number for triple in triples for number in torch_numbers(*triple)]
    assert len(set(drawn)) == len(drawn)
