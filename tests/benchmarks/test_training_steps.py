"""Training steps from end to end: rates follow from images, tokens and FLOPs; MFU only with a known peak."""

import pytest

from benchmarks import training_steps
from benchmarks.training_steps import Step
from cat_fast import hardware


def test_rates_follow_from_the_seconds_of_a_step(monkeypatch):
    step = Step(run=lambda: None, images=4, tokens=1024, flops=8e12, precision="bf16")
    found = training_steps.figures(step, [2.0, 1.0, 4.0])
    assert found["rates"] == {"images": 2.0, "tokens": 512.0}
    assert found["flops_per_image"] == 2e12
    assert found["gflops_per_second"] == pytest.approx(4000)
    assert found["mfu"] is None
    monkeypatch.setattr(training_steps.hardware, "gpu_in_use", lambda: hardware.GPUS["A100-SXM4-80GB"])
    assert training_steps.figures(step, [2.0])["mfu"] == pytest.approx(8e12 / 2 / 312e12)


def test_rounds_alternate_and_the_first_one_warms_up():
    order = []

    def make(name):
        return lambda: Step(run=lambda: order.append(name), images=1, tokens=1.0, flops=1.0, precision="fp32")

    found = training_steps.measure({"a": make("a"), "b": make("b")}, rounds=2)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert found["a"]["seconds"]["ours"].keys() == {"median", "low", "high"}


def test_an_unknown_case_is_an_error(capsys):
    assert training_steps.main(["--only", "nothing"]) == 2
    assert "expected part of one of tokenizer.nano.8x" in capsys.readouterr().err
