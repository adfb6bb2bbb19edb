"""Benchmarks without baselines: scoring against published times, start-up of commands, checkpoints."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import checkpoints, linear, scoring, startup
from benchmarks.documents import linear as linear_document
from benchmarks.shared import simple_program
from benchmarks.shared.steps import Step
from cat_fast.complexity.scoring_run.cost import ScoringSpeed
from cat_fast.kernels.linear import op
from cat_fast.kernels.linear.layer import Linear
from cat_fast.kernels.linear.op import selected, using
from tests.kernels.onednn import needs_onednn

ROOT = Path(__file__).parents[2]


def test_scorers_are_compared_with_the_published_seconds(monkeypatch):
    speed = ScoringSpeed("", 0.001, "core", "", "caption")
    monkeypatch.setattr(scoring, "measure_speed", lambda name, scorer: speed)
    monkeypatch.setattr(scoring, "load_scorer", lambda name: None)
    found = scoring.measure(True)
    fast = found["scorers"]["fast"]
    assert fast["rates"] == {"images": pytest.approx(1000), "captions": pytest.approx(1000)}
    assert found["scorers"]["jpeg"]["rates"].keys() == {"images"}
    assert fast["ratio_vs_published"]["LLaVA, one call"] == pytest.approx(1630)
    assert fast["ratio_vs_published"]["by another table"] == pytest.approx(50)
    assert 0 < found["scorers"]["jpeg"]["seconds"] < 1
    assert any(
        line.startswith("fast: 1000 images/s, 1000 captions/s per core; 1.63e+03 x LLaVA, one call (1.63 s)")
        for line in scoring.lines(found)
    )
    found["scorers"]["accurate"]["libraries"] = {
        "mkl_over_onednn": {"median": 1.7},
        "mkl_over_mkl": {"median": 1.0},
    }
    assert scoring.lines(found)[-1].startswith("accurate: 1.70 times as fast with oneDNN")


@needs_onednn
def test_the_scorer_is_measured_with_both_libraries(monkeypatch):
    layer, used = Linear(4, 2), []
    layer.backend = "mkl"
    monkeypatch.setattr(op, "_product", lambda x, *parts: used.append("onednn") or x)
    scorer = SimpleNamespace(
        linears=[layer],
        score_many=lambda rows: used.append(selected()) or layer(torch.ones(len(rows), 4)),
        encoder=SimpleNamespace(tokens=lambda captions: [[0] * 5 for _ in captions]),
    )
    step = scoring.scorer_step(scorer, 10)
    assert (step.images, step.tokens, step.flops) == (10, 50, 10 * 2 * 4 * 2)
    with torch.no_grad():
        linear.compare(step, 1)
    assert used == ["mkl", "mkl", "onednn", "onednn", "mkl", "onednn", "onednn", "mkl"]


def test_the_share_of_products_is_that_of_linear_layers():
    layer, order = Linear(512, 512), []

    def run():
        order.append(selected())
        layer(torch.ones(512, 512, requires_grad=True)).sum().backward()

    step = Step(run=run, images=1, tokens=1, flops=1, precision="fp32")
    with using("mkl"):
        assert 0.5 < linear.share_of_products(step, 3) < 1
    attention = partial(torch.nn.functional.scaled_dot_product_attention, *torch.ones(3, 1, 2, 64, 64))
    assert linear.share_of_products(replace(step, run=attention), 1) == 0
    assert order == ["mkl"] * 3


def test_the_limit_of_a_step_is_that_of_the_best_products():
    def case(ratio, share):
        ratios = {"median": ratio, "low": ratio, "high": ratio}
        return {"mkl_over_onednn": ratios, "mkl_over_mkl": ratios, "share_of_products": share}

    # 10 s of which 8 s are products: 2 + 8 / 4 s, and 2 + 8 / 2 s; 1 s of products tells nothing
    table = linear_document.speed(
        {"cases": {"a": case(10 / 4, 0.8), "b": case(10 / 6, 0.8), "c": case(1, 0.1)}}
    )
    rows = [[cell.strip() for cell in row.split("|")[4:7]] for row in table.splitlines()[2:]]
    assert rows == [["80%", "4.00", "2.50"], ["80%", "2.00", "2.50"], ["10%", "", "1.08"]]


def test_the_first_round_of_start_ups_does_not_count(tmp_path, monkeypatch, capsys):
    times = iter(range(100))
    found = startup.measure(True, lambda command: float(next(times)))
    count = len(startup.COMMANDS)
    assert found["seconds"]["python"] == {"median": count, "low": count, "high": count}
    monkeypatch.setattr(simple_program.machine, "describe", lambda: {"cpu": {"threads": 1}})
    out = tmp_path / "startup.json"
    code = simple_program.main("startup", "", lambda quick: found, startup.lines, ["--json", str(out)])
    assert code == 0
    assert json.loads(out.read_text())["about"]["benchmark"] == "startup"
    assert f"python: {count:.2f} s" in capsys.readouterr().out


def test_a_command_that_fails_is_an_error():
    assert startup.seconds_of(("-c", "pass")) > 0
    with pytest.raises(RuntimeError, match="NameError"):
        startup.seconds_of(("-c", "nothing"))


def test_checkpoints_are_summarized_by_medians():
    found = checkpoints.summary([(1.0, 2.0, 100), (3.0, 4.0, 100), (2.0, 2.0, 100)])
    assert found == {
        "bytes": 100,
        "save_seconds": 2.0,
        "load_seconds": 2.0,
        "save_bytes_per_second": 50.0,
        "load_bytes_per_second": 50.0,
    }
    assert checkpoints.lines({"checkpoints": {"nano": found}})[0].startswith(
        "nano: 0.0001 MB, saved in 2.00 s"
    )


@needs_onednn
def test_libraries_of_matrix_products_take_turns():
    order = []
    step = Step(run=lambda: order.append(selected()), images=2, tokens=32, flops=6e9, precision="fp32")
    found = linear.compare(step, 2)
    assert order == ["mkl", "onednn", *["mkl", "onednn", "mkl"] * 2]
    assert set(found["step_seconds"]) == set(linear.SIDES)
    assert found["rounds"] == 2
    ratio = {"median": 2.0, "low": 1.9, "high": 2.1}
    ratios = {"mkl_over_onednn": ratio, "mkl_over_mkl": dict.fromkeys(ratio, 1.0)}
    cases = {"transformer": found | ratios | {"share_of_products": 0.6}}
    text = linear.lines({"auto": "onednn", "threads": 1, "cases": cases})
    assert text[1].startswith("transformer: oneDNN 2.00 times as fast as MKL (1.90 to 2.10)")
    assert text[1].endswith("products are 60% of the step by MKL")


def test_both_registrations_of_an_operator_have_the_same_results():
    """On a GPU the same operators would be launched; here they run on the CPU."""
    code = """
import torch
from benchmarks import dispatch
for name, sides in dispatch.calls().items():
    usual, ours = (run() for run in sides.values())
    if name == "choice_of_backend":
        assert usual == ours, (usual, ours)
    else:
        torch.testing.assert_close(usual, ours, rtol=0, atol=0)
print(dispatch.lines({"cases": {"x": dispatch._compare(sides, 2, 3)}})[0])
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CAT_FAST_BACKEND": ""}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "us as usual" in ran.stdout
