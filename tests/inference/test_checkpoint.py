"""A tokenizer is loaded from its folder as it was saved, without asking anyone outside."""

import socket

import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.inference.checkpoint import load_tokenizer
from cat_fast.tokenizer import NestedAutoencoderKL


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return NestedAutoencoderKL(
        block_out_channels=(8, 8, 8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_num_layers=1,
    )


def test_the_same_tokenizer_comes_back_ready_for_use(tokenizer, tmp_path):
    tokenizer.train().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, "cpu")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert not loaded.training
    assert loaded.device == torch.device("cpu")


def test_a_folder_without_weights_is_refused_without_asking_the_network(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_config(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path, "cpu")


def test_weights_of_another_shape_are_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"latent_channels": 4', '"latent_channels": 6'))
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_tokenizer(tmp_path, "cpu")
    assert "\n" not in str(caught.value)


def test_config_that_makes_no_model_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"norm_num_groups": 4', '"norm_num_groups": 3'))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path, "cpu")
