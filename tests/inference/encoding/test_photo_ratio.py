"""What decides a photograph's ratio, and which of several things said about it counts."""

import json

import pytest
import torch
from PIL import Image

from cat_fast.complexity import Description, RatioThresholds, choose_ratio, jpeg_ratio
from cat_fast.errors import UserError
from cat_fast.inference.encoding.photo_ratio import (
    PhotoDescriptions,
    adaptive_ratio,
    read_photo_captions,
    require_served,
)

DOG = Description("a dog lying on grass")


@pytest.mark.parametrize("name", ["{path}", "cat.jpg", "cat"])
def test_rows_name_a_photograph_by_path_file_name_or_stem(tmp_path, name):
    photo = tmp_path / "cat.jpg"
    said = PhotoDescriptions(rows={name.format(path=photo): DOG})
    assert said.find(photo) == DOG
    assert said.find(tmp_path / "bobcat.jpg") is None


def test_the_more_explicit_word_counts(tmp_path):
    photo = tmp_path / "a.jpg"
    (tmp_path / "a.txt").write_text("  from the file\nbeside it ")
    beside = Description("from the file beside it", has_faces=True)
    assert PhotoDescriptions(has_faces=True).find(photo) == beside
    assert PhotoDescriptions(caption="for all").find(photo) == Description("for all")
    assert PhotoDescriptions(caption="for all", rows={"a.jpg": DOG}).find(photo) == DOG


def test_a_text_file_may_carry_the_whole_name(tmp_path):
    (tmp_path / "a.jpg.txt").write_text(DOG.caption)
    assert PhotoDescriptions().find(tmp_path / "a.jpg") == DOG


def test_a_blank_text_file_says_nothing(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    assert PhotoDescriptions().find(tmp_path / "a.jpg") is None


def test_captions_file(tmp_path):
    path = tmp_path / "captions.jsonl"
    rows = [
        {"file": "a.jpg", "caption": "a shop sign"},
        {"key": "b", "caption": "a dog lying on grass", "has_text": False},
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    assert read_photo_captions(path, has_text=True) == {
        "a.jpg": Description("a shop sign", has_text=True),
        "b": DOG,
    }


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"caption": "a dog"}], '"file" or "key"'),
        ([{"file": 3, "caption": "a dog"}], '"file" or "key"'),
        ([{"file": "a", "caption": "a dog"}, {"key": "a", "caption": "a cat"}], "caption 2: a has a caption"),
        ([{"file": "a", "caption": ""}], "non-empty"),
    ],
)
def test_a_malformed_captions_file_is_refused(tmp_path, rows, reason):
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=reason):
        read_photo_captions(path)


def test_captions_without_pictures_names_are_refused(tmp_path):
    (tmp_path / "captions.txt").write_text("a dog\n")
    with pytest.raises(UserError, match=r"\.jsonl"):
        read_photo_captions(tmp_path / "captions.txt")


def test_a_caption_is_scored_with_the_thresholds_given(tmp_path):
    photo, image = tmp_path / "a.jpg", Image.new("RGB", (8, 8))
    for thresholds in (RatioThresholds(0, 0), RatioThresholds(0, 9), RatioThresholds(9, 9)):
        choice = adaptive_ratio(PhotoDescriptions(caption=DOG.caption), thresholds)(photo, image)
        result = choose_ratio(DOG, thresholds=thresholds)
        assert (choice.ratio, choice.score, choice.source) == (result.ratio, result.score, "caption")


def test_without_a_caption_the_jpeg_size_decides(tmp_path):
    noise = torch.randint(
        0, 256, (3, 512, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pictures = {32: torch.full_like(noise, 90), 8: noise}
    for ratio, pixels in pictures.items():
        assert jpeg_ratio(pixels) == ratio
        choice = adaptive_ratio(PhotoDescriptions())(
            tmp_path / "a.jpg", Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        )
        assert (choice.ratio, choice.score, choice.source) == (ratio, None, "jpeg size")


def test_ratios_that_a_tokenizer_does_not_serve():
    require_served(16, (16,))
    require_served(None, (8, 16, 32))
    with pytest.raises(UserError, match="no ratio 8"):
        require_served(8, (16, 32))
    with pytest.raises(UserError, match="adaptive"):
        require_served(None, (16, 32))
