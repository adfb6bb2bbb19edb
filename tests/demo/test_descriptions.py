"""Descriptions of the demo: flags of the detectors, kept in a file, or listed ones without the extra."""

import json
from pathlib import Path

import pytest

from cat_fast.complexity.captioners import detectors
from cat_fast.data.photographs import photographs
from cat_fast.demo.descriptions import LISTED, describe_photographs, records_of
from cat_fast.errors import UserError


class Seen:
    """Detectors that find text in every second photograph."""

    name, version = "detectors", "1"
    calls = 0

    def find_flags(self, image) -> tuple[bool, bool]:
        Seen.calls += 1
        return Seen.calls % 2 == 0, True


def test_flags_of_the_detectors_are_scored_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detectors, "Detectors", Seen)
    done: list[None] = []
    held_out, source = describe_photographs(tmp_path / "flags.json", lambda: done.append(None), "held_out")
    assert source == "detectors 1"
    assert len(held_out) == len(done) == Seen.calls == len(photographs("held_out"))
    assert [photo.record.has_text for photo in held_out[:4]] == [False, True, False, True]
    found, _ = describe_photographs(tmp_path / "flags.json", lambda: done.append(None))
    assert len(found) == len(done) == Seen.calls == len(photographs())  # held-out ones are read from the file
    assert [photo for photo in found if photo.photograph.split == "held_out"] == held_out
    assert all(photo.record.has_faces and photo.record.ratio in (8, 16, 32) for photo in found)
    assert json.loads(json.dumps(found[0].to_json()))["listed"]["has_text"] == found[0].photograph.has_text
    assert describe_photographs(tmp_path / "flags.json")[0] == found
    assert Seen.calls == len(found)
    assert [len(records_of(found, split)) for split in ("train", "held_out")] == [
        len(photographs(split)) for split in ("train", "held_out")
    ]


def test_listed_flags_are_used_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise UserError("install the extra")

    monkeypatch.setattr(detectors, "Detectors", missing)
    found, source = describe_photographs(tmp_path / "flags.json")
    assert source == LISTED
    assert all(photo.record.has_text == photo.photograph.has_text for photo in found)
