"""A run starts from the weights of a trained model with the same settings, and records them."""

import json
from pathlib import Path

import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.generator import DiT
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.training.checkpoints.initial_weights import (
    describe_initial_weights,
    load_initial_weights,
    weights_digest,
)
from cat_fast.training.tokenizer.trainer import NOT_APPLIED
from tests.cli.conftest import tiny_tokenizer

SIZES = {"in_channels": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 2}


def dit(**changes: object) -> DiT:
    torch.manual_seed(len(changes))
    return DiT(**(SIZES | changes))


def test_weights_are_copied_and_recorded_with_those_before_them(tmp_path):
    trained = tiny_tokenizer()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_()
    trained.save_pretrained(tmp_path / "first" / "model")
    earlier = {"folder": "zero/model", "weights": "0" * 16, "earlier": None}
    (tmp_path / "first" / "initial_weights.json").write_text(json.dumps(earlier))
    model = NestedAutoencoderKL(**{**tiny_tokenizer().config, "sample_size": 128})
    digest = load_initial_weights(model, str(tmp_path / "first" / "model"), NOT_APPLIED)
    for name, value in trained.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], value), name
    record = describe_initial_weights(str(tmp_path / "first" / "model"))
    assert record == {"folder": str(tmp_path / "first" / "model"), "weights": digest, "earlier": earlier}
    assert load_initial_weights(model, "", ()) is None


def test_half_precision_weights_start_a_run_in_fp32(tmp_path):
    trained = dit()
    trained.to(torch.float16).save_pretrained(tmp_path / "model")
    model = dit(qk_norm=False)
    load_initial_weights(model, str(tmp_path / "model"), ())
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    for name, value in trained.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], value.float()), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, r"has model\.hidden_size 16, this run has 32"),
        ({"rope": True}, r"has model\.rope False, this run has True"),
        ({"tokenizer_fingerprint": "b" * 16}, r"model\.tokenizer_fingerprint 'a{16}', this run has 'b{16}'"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, changes, message):
    dit(tokenizer_fingerprint="a" * 16).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=f"initial_weights: .*{message}; use the settings") as error:
        load_initial_weights(
            dit(**{"tokenizer_fingerprint": "a" * 16} | changes), str(tmp_path / "model"), ()
        )
    assert "\n" not in str(error.value)


def test_a_folder_without_such_a_model_is_refused(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for folder, message in (("nowhere", "no such folder"), ("tokenizer", "NestedAutoencoderKL")):
        with pytest.raises(UserError, match=f"initial_weights: .*{message}"):
            load_initial_weights(dit(), str(tmp_path / folder), ())


def test_weights_of_either_format_are_told_apart(tmp_path):
    digests = set()
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"):
        for content in ("one", "other"):
            (tmp_path / name).write_text(f"{name}: {content}")
            digests.add(weights_digest(tmp_path))
    assert len(digests) == 4
    with pytest.raises(UserError, match=r"^initial_weights: someone/model: expected a folder with weights"):
        weights_digest(Path("someone/model"))  # a name in the hub's cache
