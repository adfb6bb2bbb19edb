"""Index records of described images: score and ratio follow the description, other fields are copied."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from torchvision.transforms.functional import pil_to_tensor

from cat_fast.complexity import Description, RatioThresholds, Score, bulk_scorer, choose_ratios, jpeg_ratio
from cat_fast.complexity.ratios.image_ratios import (
    index_photographs,
    load_index,
    ratios_by_jpeg,
    score_records,
)
from cat_fast.complexity.ratios.policy import ratio_of_file
from cat_fast.data.images.index import ImageRecord, read_index, write_index
from cat_fast.data.images.io import load_image, resize_center_crop
from cat_fast.data.photographs import photographs
from cat_fast.data.ratio_origin import ScoredBy
from cat_fast.errors import UserError


class WordCount:
    """Scores a caption by its number of words."""

    name, version = "words", "2"

    def score_many(self, descriptions):
        return [Score.of_expected(min(9, len(d.caption.split()))) for d in descriptions]


def test_record_copies_the_photograph_and_adds_score_and_ratio():
    images = photographs("held_out")
    records = index_photographs(images)
    chosen = choose_ratios([Description(p.caption, p.has_text, p.has_faces) for p in images])
    for image, record, choice in zip(images, records, chosen, strict=True):
        assert (record.score, record.ratio) == (choice.score, choice.ratio)
        for name in ("key", "caption", "has_text", "has_faces", "category"):
            assert getattr(record, name) == getattr(image, name)
        assert Path(record.path) == image.path


def test_custom_scorer_is_used():
    images = photographs("held_out")
    records = index_photographs(images, WordCount(), RatioThresholds(2, 6))
    assert [r.score for r in records] == [min(9, len(p.caption.split())) for p in images]
    assert {r.scored_by for r in records} == {ScoredBy("words", "2", (2, 6))}


def test_custom_thresholds_change_the_ratios():
    images = photographs("held_out")
    for (a, b), ratio in {(9, 9): 32, (0, 9): 16, (0, 0): 8}.items():
        records = index_photographs(images, thresholds=RatioThresholds(a, b))
        assert {r.ratio for r in records} == {ratio}


def test_name_photographs_is_the_training_split_and_other_names_are_files(tmp_path):
    train = index_photographs(photographs("train"), bulk_scorer())
    assert load_index("photographs") == train
    assert not {r.key for r in train} & {p.key for p in photographs("held_out")}
    write_index(tmp_path / "mine.jsonl", train[:2])
    assert load_index(str(tmp_path / "mine.jsonl")) == train[:2]
    with pytest.raises(UserError, match="no such file"):
        load_index(str(tmp_path / "photographs"))


def test_an_index_is_scored_while_it_is_read(tmp_path):
    captions = ["a", "a street at night", "two people in the rain at a bus stop"]
    rows = [{"path": f"{n}.jpg", "caption": caption} for n, caption in enumerate(captions)]
    rows += [{"path": "3.jpg", "caption": "a", "score": 9}, {"path": "4.jpg", "caption": "a", "ratio": 8}]
    rows += [{"path": "5.jpg"}, {"path": "6.jpg", "caption": "a", "has_text": True, "score": 5.63}]
    (tmp_path / "index.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = load_index(str(tmp_path / "index.jsonl"))
    described = [Description(caption) for caption in captions]
    chosen = choose_ratios([*described, Description("a", has_text=True)])
    expected = [(choice.score, choice.ratio) for choice in chosen]
    assert [(r.score, r.ratio) for r in records] == [
        *expected[:3],
        (9, 8),
        (None, 8),
        (None, None),
        expected[3],
    ]


def test_given_scores_and_ratios_are_kept():
    fields = {"key": "a", "path": "a.jpg", "caption": "a b c", "has_text": False, "has_faces": False}
    records = [
        ImageRecord(score=s, ratio=r, **fields) for s, r in [(7, 32), (None, 16), (7, None), (None, None)]
    ]
    scored = score_records(records, WordCount(), RatioThresholds(2, 6))
    assert [(r.score, r.ratio) for r in scored] == [(7, 32), (None, 16), (7, 8), (3, 16)]


def test_expected_scores_are_stored_and_read_back_for_real_thresholds(tmp_path):
    thresholds = RatioThresholds(2.5, 6.25)
    records = index_photographs(photographs("held_out"), thresholds=thresholds)
    write_index(tmp_path / "index.jsonl", records)
    stored = read_index(tmp_path / "index.jsonl")
    assert stored == records
    assert [r.ratio for r in records] == thresholds.ratios(r.expected for r in stored)
    assert {r.scored_by.thresholds for r in stored} == {thresholds.pair}
    unrated = [replace(r, ratio=None) for r in stored]
    assert score_records(unrated, thresholds=thresholds) == records
    with pytest.raises(UserError, match="has no expected score"):
        score_records([replace(unrated[0], expected=None)], thresholds=thresholds)


def test_ratios_by_jpeg_are_none_for_unreadable_images(tmp_path):
    records = index_photographs(photographs("held_out"))
    expected = [
        jpeg_ratio(pil_to_tensor(resize_center_crop(load_image(record.path), 512))) for record in records
    ]
    by_jpeg = ratios_by_jpeg([*records, replace(records[0], path=str(tmp_path / "none.jpg"))])
    assert by_jpeg == [*expected, None]
    assert [ratio_of_file(Path(record.path).read_bytes()) for record in records] == expected
    assert len(set(by_jpeg)) > 1
