"""A run of the decoder only leaves the latents of its initial weights as they are."""

import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.models.build import build_model
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.training.config.load import load_run
from tests.training.rank_processes import run_ranks
from tests.training.runs import settings
from tests.training.test_runs import TRAIN


def test_latents_stay_while_the_decoder_learns_with_a_gan_on_two_ranks(tmp_path):
    more = [
        f"initial_weights={tmp_path / 'first'}",
        "train_encoder=false",
        "loss.gan_loss_starting_step=1",
        "schedule.total_steps=4",
        "checkpoint.every_steps=2",
    ]
    arguments = settings("tokenizer", tmp_path / "run", tmp_path, *more)
    config = load_run(arguments[0], arguments[1:])
    torch.manual_seed(0)
    first = build_model(NestedAutoencoderKL, config.model)
    first.save_pretrained(tmp_path / "first")
    run_ranks(TRAIN, 2, *arguments)
    trained = NestedAutoencoderKL.from_pretrained(tmp_path / "run" / "model")

    changed = {
        name.split(".")[0]
        for (name, before), after in zip(first.named_parameters(), trained.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    assert changed == {"decoder", "post_quant_conv"}
    assert trained.latents_fingerprint() == first.fingerprint() != trained.fingerprint()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    for ratio in first.ratios:
        latents = [model.encode(images, ratio).latent_dist.parameters for model in (first, trained)]
        assert torch.equal(*latents)

    resumed = [one for one in arguments if one != "train_encoder=false"]
    failed, _ = run_ranks(TRAIN, 2, *resumed, "schedule.total_steps=6", code=2)
    assert "train_encoder" in failed


def test_a_decoder_is_trained_from_weights():
    with pytest.raises(UserError, match="train_encoder: false trains the decoder of a trained tokenizer"):
        load_run("configs/tokenizer/nano.yaml", ["train_encoder=false"])
