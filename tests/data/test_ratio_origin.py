"""Origins of scores and ratios survive JSON, and other values are refused."""

import json
from collections import Counter
from dataclasses import asdict

import pytest

from cat_fast.data.ratio_origin import RatioOrigin, ScoredBy, origins_from_json, origins_to_json

SCORER = ScoredBy("embedded", "0123", (2, 6))


def test_scorer_makes_the_round_trip_and_is_one_object_for_all_rows():
    fields = json.loads(json.dumps(asdict(SCORER)))
    assert ScoredBy.of(fields) == SCORER
    assert ScoredBy.of(fields) is ScoredBy.of({**fields, "thresholds": (2.0, 6.0), "other": 1})
    assert ScoredBy.of(SCORER) is SCORER
    assert ScoredBy.of(None) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"scorer": 1},
        {"version": None},
        {"thresholds": [2]},
        {"thresholds": [2, 6, 8]},
        {"thresholds": [float("nan"), 6]},
        {"thresholds": [True, 6]},
        {"thresholds": "26"},
        {"thresholds": ["2", "6"]},
        {"thresholds": None},
    ],
)
def test_other_objects_are_refused(changes):
    with pytest.raises(ValueError, match="scored_by: expected"):
        ScoredBy.of(asdict(SCORER) | changes)
    incomplete = asdict(SCORER)
    del incomplete[next(iter(changes))]
    for value in (incomplete, "alice", 3, ["embedded", "0123", [2, 6]]):
        with pytest.raises(ValueError, match="scored_by: expected"):
            ScoredBy.of(value)


def test_origins_make_the_round_trip():
    origins = Counter(
        {
            RatioOrigin(source="score", scored_by=SCORER, thresholds=(4, 7)): 3,
            RatioOrigin(source="score", thresholds=(4.25, 7.0)): 2,
            RatioOrigin(source="ratio", scored_by=SCORER): 1,
            RatioOrigin(source="jpeg size", jpeg_thresholds=(30, 60)): 4,
            RatioOrigin(source="fixed"): 5,
        }
    )
    rows = json.loads(json.dumps(origins_to_json(origins)))
    assert origins_from_json(rows) == origins
    assert {"source": "fixed", "images": 5} in rows
    assert {"source": "jpeg size", "jpeg_thresholds": [30, 60], "images": 4} in rows
