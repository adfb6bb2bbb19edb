"""The committed results of the detectors, and the same on the packaged photographs."""

import json

import pytest

from benchmarks.detectors import measure
from benchmarks.shared.committed import committed
from cat_fast.complexity.captioners.detectors import Detectors
from cat_fast.data.photographs import photographs

RESULTS = committed("detectors")


def check(found: dict) -> None:
    assert found["images"] == len(photographs()) == 56
    assert min(found["agreement"].values()) >= 0.9
    assert found["cpu_seconds"]["mean"] <= 2


def test_committed_results_are_of_all_photographs() -> None:
    sets = json.loads(RESULTS.read_text(encoding="utf-8"))["sets"]
    check(sets["photographs"])
    assert sets["imagenet_sample"]["images"] == 712
    for found in sets.values():
        assert all(sum(counts.values()) == found["images"] for counts in found["counts"].values())


@pytest.mark.slow
def test_detectors_agree_with_the_attribution_list() -> None:
    check(measure(Detectors(), [(p.key, p.path, p.has_text, p.has_faces) for p in photographs()]))
