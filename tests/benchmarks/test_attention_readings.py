"""The comparison of the attention's readings: both see the same steps, and the better one is ahead."""

import json

import pytest

from benchmarks import attention_readings
from benchmarks.attention_readings import READINGS, compared, main
from benchmarks.shared.committed import committed
from cat_fast.config import read_yaml
from cat_fast.errors import UserError
from cat_fast.training.metrics.run_log import read_metrics


def run(loss, psnr, perceptual):
    held_out = {ratio: {"psnr": psnr, "perceptual": perceptual} for ratio in ("8", "16")}
    return {"seed": 0, "training_loss": loss, "held_out": held_out}


def test_ahead_is_a_lower_loss_and_distance_and_a_higher_psnr():
    ahead = compared({"heads_of_1": [run(0.2, 21.0, 0.4)], "one_head": [run(0.3, 20.0, 0.5)]})
    assert ahead["heads_of_1_ahead_by"] == {
        "training_loss": [pytest.approx(0.1)],
        "psnr": [pytest.approx(1.0)],
        "perceptual": [pytest.approx(0.1)],
    }


def test_our_own_default_is_one_of_the_readings_and_the_committed_result_favours_it():
    """The nano model follows what was measured: never behind by ST-LPIPS, and level otherwise."""
    model = read_yaml(attention_readings.CONFIG)["model"]
    assert model["mid_block_attention_head_dim"] == READINGS["heads_of_1"]
    results = committed("attention_readings")
    ahead = json.loads(results.read_text())["heads_of_1_ahead_by"]
    assert min(ahead["perceptual"]) > 0
    assert sum(ahead["training_loss"]) > 0


def test_a_run_with_other_settings_is_not_reused(tmp_path):
    folder, settings = tmp_path / "one_head_0", ["seed=0", "schedule.total_steps=400"]
    attention_readings.require_same_settings(folder, settings)
    folder.mkdir()
    attention_readings.require_same_settings(folder, settings)
    with pytest.raises(
        UserError, match=r"one_head_0 was trained with other settings .*total_steps=4, .*total_steps=400"
    ):
        attention_readings.require_same_settings(folder, ["seed=0", "schedule.total_steps=4"])


@pytest.mark.slow
def test_both_readings_are_trained_on_the_same_ratios_and_a_second_call_trains_nothing(tmp_path, capsys):
    toy = [
        "model.block_out_channels=[4,4,8,8,8,128]",
        "model.norm_num_groups=2",
        "model.latent_channels=4",
        "data.image_size=32",
        "data.batch_size=2",
        "data.max_side=64",
        "perceptual_crop=32",
        "discriminator.resolution=16",
        "discriminator.channel_base=128",
    ]
    out, results = tmp_path / "runs", tmp_path / "results.json"
    arguments = ["--out", str(out), "--json", str(results), "--steps", "4", "--seeds", "1", *toy]
    assert main(arguments) == 0
    ratios = [
        [{name for name in record if name.startswith("loss_")} for record in read_metrics(out / f"{name}_0")]
        for name in READINGS
    ]
    assert ratios[0] == ratios[1]
    first = json.loads(results.read_text())
    assert {run["seed"] for runs in first["runs"].values() for run in runs} == {0}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
    assert main(arguments) == 0
    assert json.loads(results.read_text())["runs"] == first["runs"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")} == before
