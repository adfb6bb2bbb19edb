"""Runs that train the guide: exact resume, two ranks, both kinds of codebook, metrics and refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cat_fast.config import fill, read_yaml
from cat_fast.dual_token.guide.model import GuideModel
from cat_fast.dual_token.tokenizer import DualTokenizer
from cat_fast.errors import UserError
from cat_fast.training.config.runs import RUNS
from tests.training.rank_processes import run_ranks

TINY = [
    "configs/dual_token/nano_guide.yaml",
    "model.block_out_channels=[4,8,8,8]",
    "model.decoder_out_channels=[8,8]",
    "model.mid_block_attention_head_dim=8",
    "model.norm_num_groups=2",
    "model.code_channels=4",
    "model.codebook_size=16",
    "data.index=photographs",
    "data.held_out=''",
    "data.image_size=32",
    "data.max_side=64",
    "data.batch_size=2",
    "grids=[2,4]",
    "schedule.warmup_steps=2",
    "codebook.revive_every_steps=2",
]
WEIGHTS = "model/diffusion_pytorch_model.safetensors"


def train(out, ranks, *more):
    run_ranks("tests.training.runs:train_as_rank", ranks, *TINY, f"output_dir={out}", *more)
    return load_file(out / WEIGHTS)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_logs_evaluates_and_exports_a_model(tmp_path):
    settings = ["evaluation.every_steps=4", "evaluation.images=3"]
    whole = train(tmp_path / "whole", 1, "schedule.total_steps=4", *settings, "logging.grid_every_steps=4")
    lines = metrics(tmp_path / "whole")
    assert {"loss", "mse", "commitment", "codes_used", "perplexity"} <= lines[0].keys()
    assert 0 < lines[0]["codes_used"] <= 1
    assert 1 <= lines[0]["perplexity"] <= 16
    assert any("mse_4px" in line for line in lines) or any("mse_8px" in line for line in lines)
    assert list((tmp_path / "whole").rglob("*.png"))
    evaluations = (tmp_path / "whole" / "evaluation.jsonl").read_text()
    assert "held_out/psnr_8px" in evaluations
    assert "held_out/gain_over_mean_colour_4px" in evaluations
    assert set(whole) == set(GuideModel.from_pretrained(tmp_path / "whole" / "model").state_dict())
    tokens = DualTokenizer.from_pretrained(tmp_path / "whole" / "model", "cpu").encode(
        torch.zeros(3, 32, 32), 4
    )
    assert tokens.grid == (4, 4)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_interruption_changes_nothing(tmp_path, codebook):
    settings = [f"model.codebook={codebook}", "schedule.kind=constant", "evaluation.every_steps=0"]
    whole = train(tmp_path / "whole", 1, "schedule.total_steps=3", *settings)
    train(tmp_path / "parts", 1, "schedule.total_steps=1", "checkpoint.every_steps=1", *settings)
    parts = train(tmp_path / "parts", 1, "schedule.total_steps=3", "checkpoint.every_steps=1", *settings)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_revived_codes_of_a_gradient_codebook_survive_the_next_step(tmp_path):
    torch.manual_seed(0)
    settings = ["model.codebook=gradient", "evaluation.every_steps=0", "optimizer.lr=1e-12", "ema_decay=0"]
    one = train(tmp_path / "a", 1, *settings, "schedule.total_steps=1", "codebook.revive_every_steps=0")
    two = train(tmp_path / "b", 1, *settings, "schedule.total_steps=2", "codebook.revive_every_steps=9")
    name = "quantizer.codebook"
    changed = ((one[name] - two[name]).abs().sum(1) > 1e-3).sum()
    assert changed >= 8
    encoder = "encoder.conv_in.weight"
    torch.testing.assert_close(one[encoder], two[encoder], rtol=0, atol=1e-8)


def test_two_ranks_train_one_codebook(tmp_path):
    weights = train(tmp_path / "run", 2, "schedule.total_steps=3", "evaluation.every_steps=0")
    assert torch.isfinite(weights["quantizer.codebook"]).all()
    assert metrics(tmp_path / "run")[0]["images"] == 4


def test_weights_of_another_run_include_its_codebook(tmp_path):
    first = train(tmp_path / "a", 1, "schedule.total_steps=2", "evaluation.every_steps=0")
    second = train(
        tmp_path / "b", 1, "schedule.total_steps=1", "evaluation.every_steps=0", "optimizer.lr=1e-12",
        "codebook.revive_every_steps=0", "codebook.decay=0.999999", f"initial_weights={tmp_path / 'a/model'}",
    )  # fmt: skip
    torch.testing.assert_close(
        first["quantizer.codebook"], second["quantizer.codebook"], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("grids=[]", "grids: expected at least one"),
        ("grids=[0]", "grids: expected a number of tokens per side"),
        ("grids=[[20,10]]", "another aspect ratio than crops of 128 x 128 px"),
        ("codebook.decay=1", "codebook.decay"),
        ("codebook.revive_below=2", "codebook.revive_below"),
        ("codebook.commitment_weight=-1", "codebook.commitment_weight"),
        ("deepspeed=deepspeed/zero3.json", "stage 3"),
    ],
)
def test_invalid_settings_are_refused(override, words):
    values = read_yaml("configs/dual_token/nano_guide.yaml")
    with pytest.raises(UserError, match=words):
        fill(RUNS["dual_guide"], values, [override])


@pytest.mark.parametrize("name", ["guide", "guide_372", "nano_guide"])
def test_configurations_build_with_the_papers_sizes(name):
    values = read_yaml(f"configs/dual_token/{name}.yaml")
    run = fill(RUNS[values["task"]], values, [])
    with torch.device("meta"):
        model = GuideModel(**run.model)
    sizes = {height * width: model.guide_size((height, width)) for height, width in run.all_grids}
    expected = {4: (16, 16), 16: (32, 32), 64: (64, 64), 256: (128, 128)}
    assert sizes == ({340: (160, 136)} if name == "guide_372" else expected)
