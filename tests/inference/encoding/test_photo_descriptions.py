"""Descriptions of photographs: precedence of captions, and reading of captions files."""

import json
from pathlib import Path

import pytest

from cat_fast.complexity import Description
from cat_fast.errors import UserError
from cat_fast.inference.encoding.photo_descriptions import (
    PhotoCaptions,
    PhotoDescriptions,
    read_photo_captions,
)

DOG = Description("a dog lying on grass")


def captions(folder, *names):
    return PhotoCaptions(folder / "captions.jsonl", dict.fromkeys(names, DOG))


@pytest.fixture
def photos(tmp_path):
    """Return a.jpg, sub/a.jpg and sub/b.png."""
    (tmp_path / "sub").mkdir()
    paths = [tmp_path / name for name in ("a.jpg", "sub/a.jpg", "sub/b.png")]
    for path in paths:
        path.touch()
    return paths


@pytest.mark.parametrize(
    ("name", "matched"),
    [
        ("a.jpg", [0]),  # the path exists: the other a.jpg is another image
        ("a", [0]),
        ("./a.jpg", [0]),
        ("sub/a.jpg", [1]),
        ("sub/a", [1]),
        ("sub/../sub/b.png", [2]),
        ("b.png", [2]),  # no such path: an image of this name in any folder
        ("b", [2]),
        ("other/b.png", []),
        ("c.jpg", []),
        ("\0", []),
    ],
)
def test_rows_are_relative_to_the_captions_file(tmp_path, photos, monkeypatch, name, matched):
    rows = captions(tmp_path, name)
    monkeypatch.chdir(tmp_path / "sub")  # the working directory does not matter
    for given in (photos, [Path("..", p.relative_to(tmp_path)) for p in photos]):
        assert [n for n, photo in enumerate(given) if PhotoDescriptions(rows=rows).find(photo)] == matched
        assert rows.unmatched(given) == ([] if matched else [name])


def test_rows_match_absolute_paths_and_links(tmp_path, photos):
    (tmp_path / "link.jpg").symlink_to(photos[1])
    rows = captions(tmp_path / "elsewhere", str(photos[0]), str(tmp_path / "link.jpg"))
    assert [rows.find(photo) for photo in photos] == [DOG, DOG, None]
    with pytest.raises(UserError, match=r"link\.jpg and sub/a\.jpg are the same image"):
        captions(tmp_path, "link.jpg", "sub/a.jpg")


def test_precedence_is_row_then_caption_then_text_file(tmp_path):
    photo = tmp_path / "a.jpg"
    (tmp_path / "a.txt").write_text("  from the\ntext file ")
    from_file = Description("from the text file", has_faces=True)
    assert PhotoDescriptions(has_faces=True).find(photo) == from_file
    assert PhotoDescriptions(caption="for all").find(photo) == Description("for all")
    assert PhotoDescriptions(caption="for all", rows=captions(tmp_path, "a.jpg")).find(photo) == DOG


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
    found = read_photo_captions(path, has_text=True)
    assert found.find(tmp_path / "a.jpg") == Description("a shop sign", has_text=True)
    assert found.find(tmp_path / "b.png") == Description(DOG.caption, has_text=False)


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
