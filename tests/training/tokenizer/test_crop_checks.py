"""Training crops of any size: refused if ratios or discriminator do not fit, trained on if they do."""

from types import SimpleNamespace

import pytest

from cat_fast.config import fill, read_yaml
from cat_fast.errors import UserError
from cat_fast.training.config.settings import TokenizerRun
from cat_fast.training.metrics.run_log import read_metrics
from cat_fast.training.tokenizer.crop_checks import require_discriminator_fits, require_multiples
from cat_fast.training.tokenizer.trainer import TokenizerTrainer
from tests.training.rank_processes import run_ranks
from tests.training.runs import ROOT, TOKENIZER

TRAIN = "tests.training.runs:train_as_rank"


def config(*overrides: str) -> TokenizerRun:
    path, *tiny = TOKENIZER
    return fill(TokenizerRun, read_yaml(ROOT / path), [*tiny, *overrides])


@pytest.mark.parametrize(
    ("size", "resolution", "overrides", "message"),
    [
        (
            "32",
            64,
            [],
            "crops of 32 × 32 pixels .* discriminator's 64 × 64 .* set discriminator.resolution=32$",
        ),
        ("[48,96]", 64, [], "crops of 48 × 96 .* to at least 64, or set discriminator.resolution=32$"),
        ("[96,48]", 64, ["discriminator.pretrained=d.pkl"], "use a discriminator.pretrained of lower"),
        ("[96,4]", 16, [], "or set loss.gan_weight=0$"),
        ("32", 64, ["loss.gan_loss_starting_step=50000"], "data.image_size: crops of 32 × 32"),
    ],
)
def test_crops_smaller_than_the_discriminator_are_refused(size, resolution, overrides, message):
    run = config(f"data.image_size={size}", *overrides)
    with pytest.raises(UserError, match=message):
        require_discriminator_fits(run, resolution)
    with pytest.raises(UserError, match=message):
        TokenizerTrainer(run, None, SimpleNamespace(resolution=resolution), None)


@pytest.mark.parametrize(
    ("size", "resolution", "overrides"),
    [("64", 64, []), ("[64,96]", 64, []), ("32", 64, ["loss.gan_weight=0"])],
)
def test_crops_that_hold_a_window_are_accepted(size, resolution, overrides):
    require_discriminator_fits(config(f"data.image_size={size}", *overrides), resolution)


@pytest.mark.parametrize(
    ("size", "ratios", "message"),
    [
        (
            "[48,96]",
            (8, 16, 32),
            r"48 × 96 pixels: 48 is not a multiple of the ratio 32; set it to \[64, 96\],",
        ),
        ("40", (8, 16), r"40 is not a multiple of the ratio 16; set it to 32, or remove the ratio"),
        ("[64,20]", (8,), r"20 is not a multiple of the ratio 8; set it to \[64, 16\]"),
    ],
)
def test_crops_that_are_no_multiples_of_a_ratio_are_refused(size, ratios, message):
    with pytest.raises(UserError, match=message):
        require_multiples(config(f"data.image_size={size}"), ratios)


def test_non_square_crops_train_with_the_gan_and_grids(tmp_path):
    arguments = [
        *(*TOKENIZER, f"output_dir={tmp_path}", "data.image_size=[48,96]", "perceptual_crop=64"),
        *("model.ratios=[8,16]", "sampler.shares={8: 0.5, 16: 0.5, 32: 0}", "loss.gan_loss_starting_step=1"),
        *("schedule.total_steps=6", "logging.grid_every_steps=3"),
    ]
    (output,) = run_ranks(TRAIN, 1, *arguments)
    assert "a step of 2 images at 8x, with the GAN, R1, LeCam, a grid, a checkpoint of" in output
    records = read_metrics(tmp_path)
    assert len(records) == 6
    assert {"gan", "discriminator", "lecam"} <= records[-1].keys()
    tokens = {2 * (48 / f / 2) * (96 / f / 2) for f in (8, 16)}
    assert {record["tokens"] for record in records} == tokens
    assert len(list(tmp_path.glob("grids/*.png"))) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["discriminator.resolution=64", "loss.gan_loss_starting_step=50000"],
            "data.image_size: crops of 32 × 32",
        ),
        (["data.image_size=48"], "data.image_size: 48 × 48 pixels: 48 is not a multiple of the ratio 32"),
    ],
)
def test_unfit_crops_end_both_ranks_before_step_0_with_one_line(tmp_path, overrides, message):
    outputs = run_ranks(TRAIN, 2, *TOKENIZER, f"output_dir={tmp_path}", *overrides, code=2)
    assert any(message in output for output in outputs)
    assert not any("Traceback" in output for output in outputs)
    assert not read_metrics(tmp_path)
