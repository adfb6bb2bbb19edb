"""Training of half of a tokenizer: latents of its initial weights still fit."""

import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.models.build import build_model
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.training.config.load import load_run
from tests.training.rank_processes import run_ranks
from tests.training.runs import settings
from tests.training.test_runs import TRAIN


def arguments(folder, half: str) -> list[str]:
    return settings(
        "tokenizer",
        folder / half,
        folder,
        f"initial_weights={folder / 'first'}",
        f"train_only={half}",
        "loss.gan_loss_starting_step=1",
        "schedule.total_steps=4",
        "checkpoint.every_steps=2",
    )


@pytest.mark.parametrize(
    ("half", "trained"),
    [("decoder", {"decoder", "post_quant_conv"}), ("encoder", {"encoder", "quant_conv"})],
)
def test_the_other_half_keeps_its_bits_with_a_gan_on_two_ranks(half, trained, tmp_path):
    config, *overrides = arguments(tmp_path, half)
    torch.manual_seed(0)
    first = build_model(NestedAutoencoderKL, load_run(config, overrides).model)
    first.save_pretrained(tmp_path / "first")
    run_ranks(TRAIN, 2, config, *overrides)
    further = NestedAutoencoderKL.from_pretrained(tmp_path / half / "model")

    changed = {
        name.split(".")[0]
        for (name, before), after in zip(first.named_parameters(), further.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    assert changed == trained
    assert further.latents_fingerprint() == first.fingerprint() != further.fingerprint()

    resumed = [one for one in overrides if not one.startswith("train_only")]
    refused, _ = run_ranks(TRAIN, 2, config, *resumed, "schedule.total_steps=6", code=2)
    assert "train_only" in refused


def test_half_of_a_trained_tokenizer_is_trained():
    with pytest.raises(UserError, match="train_only: decoder trains a half of a trained tokenizer"):
        load_run("configs/tokenizer/nano.yaml", ["train_only=decoder"])
    with pytest.raises(UserError, match="train_only: 'vae' is not encoder, decoder or empty"):
        load_run("configs/tokenizer/nano.yaml", ["train_only=vae"])
