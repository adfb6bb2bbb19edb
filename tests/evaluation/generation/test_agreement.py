"""Complete evaluations against torch-fidelity 0.4, by Inception-v3 with random weights."""

import pytest
import torch
from torch_fidelity import calculate_metrics

from cat_fast.data.images.io import load_image
from cat_fast.data.photographs import photographs
from cat_fast.evaluation.generation.reference import open_reference
from cat_fast.evaluation.generation.run import evaluate_generation
from cat_fast.evaluation.generation.settings import GenerationSettings
from cat_fast.evaluation.images.sets import Crop, open_images, square
from tests.evaluation.features.test_networks import random_inception

COUNT = 14


@pytest.fixture
def folders(tmp_path):
    for name in ("samples", "reference"):
        (tmp_path / name).mkdir()
    for number, photograph in enumerate(photographs("train")[: 2 * COUNT]):
        image = square(load_image(photograph.path), Crop(64))
        if number % 2:
            image = image.resize((20, 20)).resize((64, 64))
        image.save(tmp_path / ("samples" if number % 2 else "reference") / f"{number:02d}.png")
    torch.save(random_inception().state_dict(), tmp_path / "inception.pth")
    return tmp_path


@pytest.mark.slow
def test_all_metrics_equal_torch_fidelity(folders):
    options = {"cuda": False, "verbose": False, "cache": False, "samples_shuffle": False}
    expected = calculate_metrics(
        input1=str(folders / "samples"),
        input2=str(folders / "reference"),
        **dict.fromkeys(("isc", "fid", "kid", "prc"), True),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(folders / "inception.pth"),
        kid_subsets=1,
        kid_subset_size=COUNT,
        **options,
    )
    settings = GenerationSettings(
        metrics=("fid", "is", "pr", "kid"), weights={"inception": folders / "inception.pth"}, allow_few=True
    )
    found = evaluate_generation(
        open_images(folders / "samples"), open_reference(folders / "reference"), settings, folders / "out"
    )
    figures = {name.split("-", 2)[2]: value for name, value in found.result["metrics"].items()}
    for ours, theirs in (
        ("FID", "frechet_inception_distance"),
        ("IS", "inception_score_mean"),
        ("IS-std", "inception_score_std"),
        ("KID", "kernel_inception_distance_mean"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        assert figures[ours] == pytest.approx(expected[theirs], rel=1e-3), ours
