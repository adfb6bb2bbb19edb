"""Forecasts from measured steps: any packs, noise of measurements, and the correction for load."""

import pytest

from cat_fast.inference.engine.cost import CostModel
from cat_fast.inference.engine.handle import RequestRecord
from cat_fast.inference.engine.stages import Stages
from cat_fast.inference.engine.statistics import EngineStatistics
from tests.inference.engine.test_engine import request


@pytest.mark.parametrize("packs", [(1, 3, 3), (2, 2, 2)])
def test_larger_steps_take_longer_whatever_packs_were_measured(pipeline, packs):
    cost = CostModel(Stages(pipeline))
    cost.calibrate([[request(guidance_scale=1.0)] * count for count in packs], repeats=1)
    assert cost.calibrated
    flops = [count * cost.step_flops(request(), request().sample, 0) for count in (4, 40, 400)]
    seconds = [cost.step_seconds(one) for one in flops]
    assert seconds == sorted(seconds)
    assert cost.step_seconds(flops[-1] * 1000) >= seconds[0]


def test_noise_of_measurements_does_not_predict_ever_shorter_steps(pipeline, monkeypatch):
    times = iter([2.0, 1.9, 1e-3])
    monkeypatch.setattr("cat_fast.inference.engine.cost.median_seconds", lambda *_: next(times, 0.0))
    cost = CostModel(Stages(pipeline))
    cost.calibrate([[request(guidance_scale=1.0)] * count for count in (1, 4)])
    assert cost.step_seconds(1e12) >= 2.0


def test_the_correction_for_load_is_relative_to_the_forecast_without_it():
    """Requests that were forecast before others taught a correction do not raise it again."""
    statistics = EngineStatistics()

    def finish(predicted, correction):
        record = RequestRecord(
            ratio=16, tokens=4, steps=1, predicted_seconds=predicted, load_correction=correction,
            seconds_denoising=2.0,
        )  # fmt: skip
        statistics.predicted(record, alone=False)

    for _ in range(100):
        finish(1.0, 1.0)
    assert statistics.load_correction == 2.0
    for _ in range(300):
        finish(2.0, 2.0)
    assert statistics.load_correction == 2.0
    assert statistics.median_error(alone=False) == 0.0
