"""Reconstruction at every ratio: each metric belongs to the image returned with it."""

import pytest
import torch

from cat_fast.complexity.ratios.image_ratios import index_photographs
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.images.io import image_to_tensor, load_image, resize_center_crop
from cat_fast.data.photographs import photographs
from cat_fast.evaluation.metrics import mean_colour_psnr, psnr
from cat_fast.evaluation.reconstruction import RatioResult, Reconstruction, reconstruct, summarize
from cat_fast.tokenizer.perceptual import STLPIPS
from tests.cli.conftest import tiny_tokenizer

SIZE = 64


@pytest.fixture(scope="module")
def records():
    return index_photographs(photographs("held_out")[:2])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def results(tokenizer, records):
    return reconstruct(tokenizer, records, SIZE)


def test_images_come_in_order_at_each_ratio(results, records):
    assert [r.record for r in results] == records
    for result in results:
        assert list(result.at) == [8, 16, 32]
        assert result.chosen is result.at[result.record.ratio]
        for at in result.at.values():
            assert at.image.shape == (3, SIZE, SIZE)
            assert -1 <= at.image.min() <= at.image.max() <= 1


def test_the_original_is_the_centre_square_of_the_file(results, records):
    for result, record in zip(results, records, strict=True):
        square = resize_center_crop(load_image(record.path), SIZE)
        assert torch.equal(result.original, image_to_tensor(square))


@torch.no_grad()
def test_the_images_are_the_posteriors_mode_decoded(results, tokenizer):
    for result in results:
        for ratio, at in result.at.items():
            expected = tokenizer(result.original[None], ratio).sample
            torch.testing.assert_close(at.image, expected[0].clamp(-1, 1))


@torch.no_grad()
def test_the_metrics_are_those_of_the_images(results):
    distance = STLPIPS.pretrained()
    for result in results:
        original = result.original[None]
        assert result.mean_colour_psnr == pytest.approx(mean_colour_psnr(original).item())
        for ratio, at in result.at.items():
            assert at.psnr == pytest.approx(psnr(at.image[None], original).item(), abs=1e-4)
            assert at.perceptual == pytest.approx(distance(at.image[None], original).item(), abs=1e-5)
            assert at.tokens == (SIZE // ratio // 2) ** 2


def test_progress_is_reported_once_per_image_in_eval_mode(tokenizer, records):
    reports = []
    tokenizer.train()
    reconstruct(tokenizer, records[:1], SIZE, lambda: reports.append(1))
    assert reports == [1]
    assert not tokenizer.training


def made_up(ratio: int, psnrs: list[float], distances: list[float], mean_colour: float) -> Reconstruction:
    record = ImageRecord(
        key=f"p{ratio}", path="", caption="", has_text=False, has_faces=False, score=5, ratio=ratio
    )
    blank = torch.zeros(3, 8, 8)
    tokens = {8: 64, 16: 16, 32: 4}
    at = {
        f: RatioResult(image=blank, tokens=tokens[f], psnr=p, perceptual=d)
        for f, p, d in zip((8, 16, 32), psnrs, distances, strict=True)
    }
    return Reconstruction(record=record, original=blank, mean_colour_psnr=mean_colour, at=at)


def test_the_summary_holds_means_over_images():
    summary = summarize(
        [
            made_up(8, [30.0, 20.0, 10.0], [0.1, 0.2, 0.3], mean_colour=9.0),
            made_up(32, [34.0, 26.0, 16.0], [0.3, 0.4, 0.5], mean_colour=12.0),
        ]
    )
    assert summary["images"] == 2
    assert summary["mean_colour_psnr"] == 10.5
    chosen = {
        "psnr": (30 + 16) / 2,
        "perceptual": 0.3,
        "tokens": (64 + 4) / 2,
        "tokens_vs_fixed_16x": 68 / 32,
    }
    assert summary["chosen"] == pytest.approx(chosen)
    assert list(summary["per_ratio"]) == ["8", "16", "32"]
    assert summary["per_ratio"]["8"] == pytest.approx({"psnr": 32, "perceptual": 0.2, "tokens": 64})
    assert summary["per_ratio"]["16"] == pytest.approx({"psnr": 23, "perceptual": 0.3, "tokens": 16})
    assert summary["per_ratio"]["32"] == pytest.approx({"psnr": 13, "perceptual": 0.4, "tokens": 4})
