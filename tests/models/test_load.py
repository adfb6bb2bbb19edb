"""Models load from their folders as they were saved, without network access."""

import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from cat_fast.errors import UserError
from cat_fast.generator import DiT
from cat_fast.models.load import load_model, load_tokenizer
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


def test_a_saved_tokenizer_loads_in_eval_mode(tokenizer, tmp_path):
    tokenizer.train().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, "cpu")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert not loaded.training
    assert loaded.device == torch.device("cpu")


def test_a_folder_without_weights_is_refused_without_network_access(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_config(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("accessed the network"))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path, "cpu")


def test_weights_of_another_shape_are_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"latent_channels": 4', '"latent_channels": 6'))
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_tokenizer(tmp_path, "cpu")
    assert "\n" not in str(caught.value)


def test_an_invalid_config_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"norm_num_groups": 4', '"norm_num_groups": 3'))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path, "cpu")


def test_incomplete_weights_are_refused(tokenizer, tmp_path):
    """Else the missing weights would keep their random initial values."""
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["quant_conv.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"quant_conv\.weight is missing from its weights"):
        load_tokenizer(tmp_path, "cpu")


def test_the_folder_of_a_run_is_refused_with_a_hint(tmp_path):
    DiT(hidden_size=16, depth=1, num_heads=2, num_classes=2).save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(UserError, match=r"not a trained generator; did you mean .*run/model\?"):
        load_model(DiT, "generator", tmp_path / "run")
    with pytest.raises(
        UserError,
        match=r"expected the config\.json of a NestedAutoencoderKL or AutoencoderKL, got that of DiT",
    ):
        load_tokenizer(tmp_path / "run" / "model")
