"""A run with evaluations is bit-identical to one without, also after resuming, and logs them."""

import json
from types import SimpleNamespace

import torch

from cat_fast.training.metrics.evaluation_log import EVALUATIONS, read_evaluations
from cat_fast.training.metrics.run_log import read_metrics
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.tokenizer.task import TokenizerTask
from tests.training.rank_processes import run_ranks
from tests.training.runs import settings


def train(folder, every, total=4):
    arguments = settings(
        "tokenizer",
        folder,
        folder,
        f"schedule.total_steps={total}",
        f"evaluation.every_steps={every}",
        "evaluation.images=4",
        "checkpoint.every_steps=2",
        "loss.perceptual=st_lpips_alex",
    )
    run_ranks("tests.training.runs:train_as_rank", 1, *arguments)


def losses(folder):
    return [
        {k: v for k, v in record.items() if "loss" in k or "psnr" in k} for record in read_metrics(folder)
    ]


def test_evaluations_leave_the_run_as_it_is(tmp_path):
    train(tmp_path / "with", every=2)
    train(tmp_path / "without", every=0)
    assert len(losses(tmp_path / "with")) == 4
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    records = [json.loads(line) for line in (tmp_path / "with" / EVALUATIONS).read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 3]
    names = {name.rpartition("_")[0] for name in records[0]}
    assert {"held_out/psnr", "held_out/proxy-FID-vgg16", "held_out/proxy-KID-vgg16"} <= names
    summary = json.loads((tmp_path / "with" / "summary.json").read_text())
    assert summary["evaluations"] == 2
    assert summary["evaluation_share"] > 0
    train(tmp_path / "with", every=2, total=6)
    train(tmp_path / "without", every=0, total=6)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert [record["step"] for record in read_evaluations(tmp_path / "with")] == [1, 3, 5]


def test_each_batch_of_an_evaluation_reports_progress():
    class Copy(torch.nn.Module):
        ratios = (8, 16)

        def forward(self, images, ratio):
            return SimpleNamespace(sample=images)

    def evaluate(reconstruct, ratios):
        return {f"psnr_{ratio}x": reconstruct(torch.ones(1), ratio).item() for ratio in ratios}

    task, reports = TokenizerTask.__new__(TokenizerTask), []
    task.ranks, task.trainer = Ranks(), SimpleNamespace(model=Copy())
    task.ema, task.evaluation = SimpleNamespace(averaged={}), SimpleNamespace(evaluate=evaluate)
    with task.ranks.step_context.progress_reported_to(lambda: reports.append("batch")):
        assert task.evaluate() == {"psnr_8x": 1.0, "psnr_16x": 1.0}
    assert reports == ["batch", "batch"]
