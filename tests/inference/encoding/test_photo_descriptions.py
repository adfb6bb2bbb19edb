"""Descriptions of photographs: precedence of captions, and reading of captions files."""

import json

import pytest

from cat_fast.complexity import Description
from cat_fast.errors import UserError
from cat_fast.inference.encoding.photo_descriptions import PhotoDescriptions, read_photo_captions

DOG = Description("a dog lying on grass")


@pytest.mark.parametrize("name", ["{path}", "cat.jpg", "cat"])
def test_rows_match_path_file_name_or_stem(tmp_path, name):
    photo = tmp_path / "cat.jpg"
    descriptions = PhotoDescriptions(rows={name.format(path=photo): DOG})
    assert descriptions.find(photo) == DOG
    assert descriptions.find(tmp_path / "bobcat.jpg") is None


def test_precedence_is_row_then_caption_then_text_file(tmp_path):
    photo = tmp_path / "a.jpg"
    (tmp_path / "a.txt").write_text("  from the\ntext file ")
    from_file = Description("from the text file", has_faces=True)
    assert PhotoDescriptions(has_faces=True).find(photo) == from_file
    assert PhotoDescriptions(caption="for all").find(photo) == Description("for all")
    assert PhotoDescriptions(caption="for all", rows={"a.jpg": DOG}).find(photo) == DOG


def test_text_file_can_have_the_full_file_name(tmp_path):
    (tmp_path / "a.jpg.txt").write_text(DOG.caption)
    assert PhotoDescriptions().find(tmp_path / "a.jpg") == DOG


def test_blank_text_file_is_ignored(tmp_path):
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
        ([{"file": "a", "caption": "a dog"}, {"key": "a", "caption": "a cat"}], "line 2: a already has"),
        ([{"file": "a", "caption": ""}], "non-empty"),
    ],
)
def test_malformed_captions_file_is_rejected(tmp_path, rows, reason):
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=reason):
        read_photo_captions(path)


def test_captions_without_image_names_are_rejected(tmp_path):
    (tmp_path / "captions.txt").write_text("a dog\n")
    with pytest.raises(UserError, match=r"\.jsonl"):
        read_photo_captions(tmp_path / "captions.txt")
