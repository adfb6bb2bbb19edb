"""Evaluation during a run: its figures by hand, its log, and a run that it does not disturb."""

import pytest
import torch
from PIL import Image

from cat_fast.data.images.io import image_to_tensor, load_image, resize_center_crop
from cat_fast.data.photographs import photographs
from cat_fast.errors import UserError
from cat_fast.evaluation.metrics import psnr
from cat_fast.evaluation.proxy import proxy_fid
from cat_fast.tokenizer.perceptual import STLPIPS
from cat_fast.training.config.settings import EvaluationConfig
from cat_fast.training.metrics.evaluation_log import (
    PLOT,
    EvaluationLog,
    read_evaluations,
    summarize_evaluations,
)
from cat_fast.training.metrics.held_out_evaluation import SECONDS, HeldOutEvaluation
from cat_fast.training.metrics.reconstruction_grid import GridImages

SIZE = 64


def darker(images, ratio):
    return images - ratio / 64


@pytest.fixture(scope="module")
def images():
    return [load_image(p.path) for p in photographs("held_out")[:5]]


def test_figures_are_those_of_the_rounded_reconstructions(images):
    found = HeldOutEvaluation(GridImages(images, held_out=True), SIZE, 2, torch.device("cpu")).evaluate(
        darker, (8, 32)
    )
    x = torch.stack([image_to_tensor(resize_center_crop(image, SIZE)) for image in images])
    for ratio in (8, 32):
        y = ((darker(x, ratio).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        assert found[f"held_out/psnr_{ratio}x"] == pytest.approx(psnr(y, x).mean().item(), rel=1e-4)
        expected = STLPIPS.pretrained()(y, x).mean().item()
        assert found[f"held_out/st_lpips_alex_{ratio}x"] == pytest.approx(expected, rel=1e-3)
        assert found[f"held_out/proxy-FID-vgg16_{ratio}x"] == pytest.approx(proxy_fid([y], [x])[1], rel=1e-3)
    assert found["held_out/psnr_8x"] > found["held_out/psnr_32x"]
    assert found[SECONDS] > 0


def test_a_diverged_model_has_figures(images):
    evaluation = HeldOutEvaluation(GridImages(images, held_out=False), SIZE, 4, torch.device("cpu"))
    found = evaluation.evaluate(lambda x, ratio: x * torch.nan, (16,))
    assert all(name.startswith(("training/", "evaluation/")) for name in found)
    assert found["training/psnr_16x"] < 20


class Recorder:
    def __init__(self):
        self.scalars_of = {}

    def scalars(self, values, step):
        self.scalars_of[step] = values


def test_the_log_drops_repeated_steps_and_draws_a_plot(tmp_path):
    log = EvaluationLog(tmp_path, 0, [recorder := Recorder()])
    for step in (9, 19):
        log.add(step, {"held_out/psnr_8x": 20.0 + step, "held_out/psnr_16x": 18.0, SECONDS: 2.0})
    assert recorder.scalars_of[19]["held_out/psnr_8x"] == 39
    with Image.open(tmp_path / PLOT) as plot:
        assert plot.width > 400
    assert summarize_evaluations(tmp_path, 96.0) == {
        "evaluations": 2, "evaluation_seconds": 4.0, "evaluation_share": 0.04,
    }  # fmt: skip
    EvaluationLog(tmp_path, 15, [])
    assert [record["step"] for record in read_evaluations(tmp_path)] == [9]
    assert summarize_evaluations(tmp_path / "other", 1.0) == {}


def test_settings():
    config = EvaluationConfig(every_steps=10)
    assert [step for step in range(25) if config.is_due(step)] == [9, 19]
    assert not EvaluationConfig(every_steps=0).is_due(9)
    with pytest.raises(UserError, match=r"evaluation\.images"):
        EvaluationConfig(images=0)
