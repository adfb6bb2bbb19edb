"""metrics.json: every metric can be recomputed from the demo's output."""

import json

import pytest

from cat_fast.complexity import default_scorer, default_thresholds
from cat_fast.evaluation.reconstruction import summarize


def test_metrics_are_valid_json(miniature):
    assert json.loads(json.dumps(miniature.metrics, allow_nan=False)) == miniature.metrics


def test_summary_and_images_agree_with_the_reconstructions(miniature):
    metrics = miniature.metrics
    assert metrics["held_out"] == summarize(miniature.results)
    assert [image["key"] for image in metrics["images"]] == [r.record.key for r in miniature.results]
    chosen = [image["at"][str(image["ratio"])]["psnr"] for image in metrics["images"]]
    assert metrics["held_out"]["chosen"]["psnr"] == pytest.approx(sum(chosen) / len(chosen))


def test_costs_of_the_caption_set_and_the_photographs_follow_their_mixes(miniature):
    complexity = miniature.metrics["complexity"]
    thresholds = default_thresholds()
    assert complexity["thresholds"] == [thresholds.a, thresholds.b]
    assert (complexity["scorer"], complexity["version"]) == ("accurate", default_scorer().version)
    assert complexity["fixed_16x_tokens"] == (512 // 16 // 2) ** 2
    assert complexity["photographs"]["count"] == 7
    for budget in (complexity["captions"], complexity["photographs"]):
        tokens = sum(share * (512 // int(f) // 2) ** 2 for f, share in budget["mix"].items())
        assert budget["mean_tokens"] == pytest.approx(tokens)
        assert budget["relative_to_fixed_16x"] == pytest.approx(tokens / 256)


def test_training_metrics_are_the_first_step_and_the_mean_of_the_last_20(miniature):
    training = miniature.metrics["tokenizer_training"]
    losses = [2 / (1 + s) for s in range(60)]
    assert training["steps"] == 60
    assert training["seconds"] == 30.0
    assert training["first_loss"] == 2.0
    assert training["final_loss"] == pytest.approx(sum(losses[-20:]) / 20)
    assert training["final_over_first"] == pytest.approx(training["final_loss"] / 2)
    assert training["final"]["l1_32x"] == pytest.approx(0.5)
    assert not {"step", "seconds"} & training["final"].keys()


def test_samples_are_listed_without_pixels(miniature):
    assert [set(s) for s in miniature.metrics["samples"]] == [{"label", "ratio", "tokens"}] * 6
