"""`DualTokenizer`: batches of mixed grids, folders and refusals."""

import json

import pytest
import torch
from PIL import Image

from cat_fast.dual_token.tokenizer import DualTokenizer
from cat_fast.dual_token.tokens import DualTokens
from cat_fast.errors import UserError
from tests.cli.conftest import tiny_tokenizer
from tests.dual_token.conftest import tiny_guide


def images(count=3):
    torch.manual_seed(0)
    return [torch.rand(3, 40 + 8 * i, 60) * 2 - 1 for i in range(count)]


def test_a_batch_of_mixed_grids_equals_single_images(tokenizer):
    grids = [2, (4, 3), 2]
    batch = tokenizer.encode_batch(images(), grids)
    assert [tokens.grid for tokens in batch] == [(2, 2), (4, 3), (2, 2)]
    for image, grid, tokens in zip(images(), grids, batch, strict=True):
        assert tokenizer.encode(image, grid) == tokens
    guides = tokenizer.decode_guides(batch)
    for tokens, guide in zip(batch, guides, strict=True):
        torch.testing.assert_close(tokenizer.decode_guides([tokens])[0], guide, rtol=1e-5, atol=1e-5)
        assert guide.shape[-2:] == (2 * tokens.grid[0], 2 * tokens.grid[1])
    assert tokenizer.decode_guide(batch[1]).size == (6, 8)


def test_images_and_tensors_agree(tokenizer):
    pixels = (torch.rand(40, 60, 3) * 255).to(torch.uint8)
    image = Image.fromarray(pixels.numpy())
    tensor = pixels.permute(2, 0, 1).float() / 127.5 - 1
    assert tokenizer.encode(image, 4) == tokenizer.encode(tensor, 4)


def test_sequences_round_trip(tokenizer):
    tokens = tokenizer.encode(images(1)[0], (3, 5))
    assert tokenizer.vocabulary.parse(tokenizer.vocabulary.flatten(tokens)) == tokens


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "a")
    loaded = DualTokenizer.from_pretrained(tmp_path / "a", "cpu")
    assert loaded.encode(images(1)[0]) == tokenizer.encode(images(1)[0])
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.max_side == 8
    alone = DualTokenizer.from_pretrained(tmp_path / "a" / "guide", "cpu")
    assert alone.fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (0, "grid: expected"),
        ((2, 2, 2), "grid: expected"),
        (9, "at most 8"),
        ([2], "one per image, 2 in all"),
    ],
)
def test_bad_grids_are_refused(tokenizer, grid, words):
    with pytest.raises(UserError, match=words):
        tokenizer.encode_batch(images(2), grid)


def test_small_and_misshapen_images_are_refused(tokenizer):
    with pytest.raises(UserError, match="smaller than its guide"):
        tokenizer.encode(torch.zeros(3, 8, 8), 8)
    with pytest.raises(UserError, match=r"expected \(3, H, W\)"):
        tokenizer.encode(torch.zeros(1, 8, 8), 2)


def test_nothing_is_decoded_if_one_image_is_bad(tokenizer, monkeypatch):
    good = tokenizer.encode(images(1)[0], 2)
    monkeypatch.setattr(tokenizer.guide, "decode", None)
    for bad, words in (
        (DualTokens(good.semantic, good.guide + 16), "expected 0 .. 15"),
        (DualTokens(torch.zeros(32, dtype=torch.int64), good.guide), "expected 0 per image, got 32"),
    ):
        with pytest.raises(UserError, match=words):
            tokenizer.decode_guides([good, bad])


def test_other_folders_are_refused(tokenizer, tmp_path):
    def load():
        DualTokenizer.from_pretrained(tmp_path / "a", "cpu")

    with pytest.raises(UserError, match="no such folder"):
        load()
    tiny_tokenizer().save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match="of a GuideModel, got that of NestedAutoencoderKL"):
        load()
    tokenizer.save_pretrained(tmp_path / "parent" / "b")
    with pytest.raises(UserError, match=r"did you mean .*parent/b"):
        DualTokenizer.from_pretrained(tmp_path / "parent", "cpu")
    index = tmp_path / "parent" / "b" / "dual_tokenizer.json"
    for text, words in (
        ("{", "not the index"),
        (json.dumps({"_class_name": "X", "parts": [], "max_side": 2}), "got that of a X"),
        (json.dumps({"_class_name": "DualTokenizer", "parts": ["x"], "max_side": 2}), "does not know"),
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=words):
            DualTokenizer.from_pretrained(tmp_path / "parent" / "b", "cpu")


def test_damaged_weights_are_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    tiny_guide(codebook_size=8).save_pretrained(tmp_path / "other")
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / "guide" / weights).write_bytes((tmp_path / "other" / weights).read_bytes())
    with pytest.raises(UserError, match="cannot be loaded"):
        DualTokenizer.from_pretrained(tmp_path, "cpu")
