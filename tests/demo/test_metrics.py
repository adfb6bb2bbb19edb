"""metrics.json: every figure can be computed again from what the demo leaves."""

import json

import pytest

from cat_fast.complexity import default_thresholds
from cat_fast.evaluation.reconstruction import summarize


def test_it_is_json_that_another_program_can_read(miniature):
    assert json.loads(json.dumps(miniature.metrics, allow_nan=False)) == miniature.metrics


def test_the_summary_and_the_images_are_those_of_the_reconstructions(miniature):
    metrics = miniature.metrics
    assert metrics["held_out"] == summarize(miniature.results)
    assert [p["key"] for p in metrics["images"]] == [r.record.key for r in miniature.results]
    chosen = [p["at"][str(p["ratio"])]["psnr"] for p in metrics["images"]]
    assert metrics["held_out"]["chosen"]["psnr"] == pytest.approx(sum(chosen) / len(chosen))


def test_the_caption_set_costs_what_a_fixed_16x_tokenizer_does(miniature):
    complexity = miniature.metrics["complexity"]
    thresholds = default_thresholds()
    assert complexity["thresholds"] == [thresholds.a, thresholds.b]
    assert complexity["fixed_16x_tokens"] == (512 // 16 // 2) ** 2
    assert abs(complexity["captions"]["relative_to_fixed_16x"] - 1) <= 0.05
    photographs = complexity["photographs"]
    assert photographs["count"] == 7
    tokens = sum(share * (512 // int(f) // 2) ** 2 for f, share in photographs["mix"].items())
    assert photographs["mean_tokens"] == pytest.approx(tokens)


def test_training_is_told_by_its_first_step_and_the_mean_of_its_last_twenty(miniature):
    training = miniature.metrics["tokenizer_training"]
    losses = [2 / (1 + s) for s in range(60)]
    assert training["steps"] == 60
    assert training["seconds"] == 30.0
    assert training["first_loss"] == 2.0
    assert training["final_loss"] == pytest.approx(sum(losses[-20:]) / 20)
    assert training["final_over_first"] == pytest.approx(training["final_loss"] / 2)
    assert training["final"]["l1_32x"] == pytest.approx(0.5)
    assert not {"step", "seconds"} & training["final"].keys()


def test_samples_are_told_without_their_pixels(miniature):
    assert [set(s) for s in miniature.metrics["samples"]] == [{"label", "ratio", "tokens"}] * 6
