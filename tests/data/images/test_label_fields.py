"""Labels in rows: one set of rules for all sources."""

import pytest

from cat_fast.data.images.label_fields import given_labels, required_text

GOOD = {"caption": "a street", "category": "7", "has_text": True}


@pytest.mark.parametrize("number", [5.63, 0, 10, 6.5e3, float("inf"), -1])
def test_another_score_keeps_the_other_labels(number):
    reported = []
    assert given_labels(GOOD | {"score": number}, lambda *report: reported.append(report)) == GOOD
    assert reported == [("score", f"expected an integer from 1 to 9, got {number!r}")]


def test_an_aspect_ratio_keeps_the_other_labels():
    assert given_labels(GOOD | {"ratio": 1.333}) == GOOD
    assert given_labels({"ratio": 16.0, "score": 5.0}) == {"ratio": 16, "score": 5}


@pytest.mark.parametrize("value", [0.9, 9.5, True, "4.4", "a value", [4.4], float("inf")])
def test_another_expected_value_keeps_the_other_labels(value):
    reported = []
    assert given_labels(GOOD | {"expected": value}, lambda *report: reported.append(report)) == GOOD
    assert reported == [("expected", f"expected a number from 1 to 9, got {value!r}")]
    assert given_labels({"score": 4, "expected": 4}) == {"score": 4, "expected": 4.0}


def test_null_and_nan_are_unset_and_other_fields_are_ignored():
    assert given_labels(GOOD | {"score": None, "ratio": float("nan"), "width": 96}) == GOOD


@pytest.mark.parametrize("flag", ["has_text", "has_faces"])
@pytest.mark.parametrize("value", ["false", "true", "", 0, 1, 1.0, []])
def test_flags_are_true_or_false(flag, value):
    with pytest.raises(ValueError, match=rf"^{flag}: expected true or false, got "):
        given_labels({flag: value})
    assert given_labels({flag: False}) == {flag: False}


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        (" \ufeffa street\n", "a street"),
        (["a street"], "a street"),
        (["a street", "a lane.", " "], "a street. a lane."),
        ([], ""),
        ("nice \ud83d", "nice \ufffd"),
    ],
)
def test_captions(value, caption):
    assert given_labels({"caption": value}) == {"caption": caption}


@pytest.mark.parametrize(
    "row",
    [{"caption": value} for value in (7, True, {"en": "a"}, ["a", 7], [["a"]])]
    + [{"category": value} for value in (True, 0.5, ["a"], {})]
    + [{"score": value} for value in ("5", True, [5])]
    + [{"ratio": value} for value in ("16", False, {})],
)
def test_labels_of_another_type_are_refused(row):
    (label,) = row
    with pytest.raises(ValueError, match=f"^{label}: expected "):
        given_labels(row)


def test_a_class_may_be_a_number():
    assert given_labels({"category": 7}) == given_labels({"category": 7.0}) == {"category": "7"}


def test_required_fields():
    assert [required_text({"key": key}, "key") for key in ("a", 7)] == ["a", "7"]
    with pytest.raises(ValueError, match="the field key is missing"):
        required_text({"key": None}, "key")
    for value in (1.5, True, ["a"], ""):
        with pytest.raises(ValueError, match="key: expected text"):
            required_text({"key": value}, "key")
