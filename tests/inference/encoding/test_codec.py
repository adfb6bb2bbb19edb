"""Encoding photographs: captions scored in batches, images encoded in batches, errors of single images."""

import numpy as np
import pytest
import torch
from PIL import Image

from cat_fast.complexity import RATIOS, Score
from cat_fast.complexity.ratios.policy import RatioPolicy
from cat_fast.data.images.io import image_to_tensor
from cat_fast.errors import UserError
from cat_fast.inference.encoding import codec
from cat_fast.inference.encoding.codec import encode_files
from cat_fast.inference.encoding.latent_file import LatentFile
from cat_fast.inference.encoding.photo_descriptions import PhotoDescriptions
from cat_fast.inference.encoding.ratio_batches import ImageToEncode, encode_batch, encode_by_ratio
from cat_fast.inference.encoding.requirements import require_served
from tests.cli.conftest import tiny_tokenizer

COLOURS = [(20 * n, 250 - 20 * n, 90) for n in range(7)]


class Recorder:
    """Scorer that returns the number in a caption plus one, and records its batches."""

    name, version = "recorder", "1"

    def __init__(self):
        self.batches = []

    def score_many(self, descriptions):
        self.batches.append([d.caption for d in descriptions])
        return [Score.of_expected(int(d.caption.split()[1]) + 1) for d in descriptions]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(seed=0).eval()


@pytest.fixture
def photos(tmp_path):
    """Seven photographs: the third is damaged, the sixth has no caption, the last caption is unreadable."""
    files = []
    for number, colour in enumerate(COLOURS):
        files.append(tmp_path / f"{number}.png")
        Image.new("RGB", (64, 64), colour).save(files[-1])
        if number != 5:
            files[-1].with_suffix(".txt").write_text(f"number {number}")
    files[2].write_bytes(b"damaged")
    files[6].with_suffix(".txt").write_bytes(b"\xff\xfe\xff")
    return files


def test_results_do_not_depend_on_the_scoring_batch_size(tokenizer, photos, tmp_path, monkeypatch):
    captions = [f"number {n}" for n in range(5)]
    results = {}
    for batch_size in (256, 4, 1):
        monkeypatch.setattr(codec, "_SCORING_BATCH_SIZE", batch_size)
        policy, out = RatioPolicy(("caption",), scorer=Recorder()), tmp_path / f"{batch_size}.safetensors"
        found = encode_files(photos, out, tokenizer=tokenizer, policy=policy, size=64)
        starts = range(0, 5, batch_size)
        assert policy.scorer.batches == [captions[start : start + batch_size] for start in starts]
        results[batch_size] = found, out.read_bytes()
    assert results[256] == results[4] == results[1]
    found, _ = results[256]
    assert [result.choice and result.choice.score for result in found] == [1, 2, None, 4, 5, None, None]
    assert [result.choice and result.choice.source for result in found][5] == "jpeg size"
    assert [bool(result.error) for result in found] == [False, False, True, False, False, False, True]
    assert len(LatentFile.open(tmp_path / "1.safetensors").records) == 5


def test_fixed_ratio_reads_no_captions(tokenizer, photos, tmp_path):
    found = encode_files(
        photos, tmp_path / "out", tokenizer=tokenizer, policy=RatioPolicy((), fixed=16), size=64
    )
    assert [result.choice and result.choice.ratio for result in found] == [16, 16, None, 16, 16, 16, 16]


def test_caption_argument_overrides_caption_files(tokenizer, photos, tmp_path):
    policy = RatioPolicy(("caption",), scorer=Recorder())
    descriptions = PhotoDescriptions(caption="number 6")
    encode_files(
        photos[:2], tmp_path / "out", tokenizer=tokenizer, policy=policy, descriptions=descriptions, size=64
    )
    assert policy.scorer.batches == [["number 6", "number 6"]]


def test_batches_have_one_ratio_each_and_are_yielded_when_full(tokenizer):
    pixels = torch.randint(0, 256, (7, 3, 64, 64), dtype=torch.uint8)
    ratios = [8, 16, 8, 8, 32, 16, 8]
    images = [ImageToEncode(n, pixels[n], ratio) for n, ratio in enumerate(ratios)]
    batches = list(encode_by_ratio(tokenizer, images, 2))
    assert [[item for item, _ in batch] for batch in batches] == [[0, 2], [1, 5], [3, 6], [4]]
    for batch in batches:
        for item, latent in batch:
            (alone,) = encode_batch(tokenizer, [pixels[item]], ratios[item])
            torch.testing.assert_close(latent, alone)


def test_uint8_and_float_pixels_give_the_same_latents(tokenizer):
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    (by_bytes,), (by_floats,) = (
        encode_batch(tokenizer, [one], 8) for one in (pixels, image_to_tensor(image))
    )
    assert torch.equal(by_bytes, by_floats)


def test_require_served_rejects_missing_ratios():
    require_served(16, (16,))
    require_served(None, RATIOS)
    with pytest.raises(UserError, match="no ratio 8"):
        require_served(8, (16, 32))
    with pytest.raises(UserError, match="adaptive"):
        require_served(None, (16, 32))
