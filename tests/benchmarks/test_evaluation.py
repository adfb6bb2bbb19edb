"""The benchmark of evaluations at toy size."""

import json

import pytest

from benchmarks import evaluation


def test_quick_run_of_the_distances(tmp_path, capsys):
    for name in ("statistics", "square_root", "neighbours"):
        assert evaluation.main(["--quick", "--only", name, "--json", str(tmp_path / f"{name}.json")]) == 0
        report = json.loads((tmp_path / f"{name}.json").read_text())
        assert report["cases"][name]["cpu_seconds"] > 0
        assert report["about"]["benchmark"] == "evaluation"
    assert capsys.readouterr().out.count("within bounds") == 3


def test_exceeded_bounds_are_named():
    assert evaluation.exceeded("neighbours", {"cpu_seconds": 700.0, "bytes": 1e9}) == ["cpu_seconds"]
    assert evaluation.exceeded("statistics", {"cpu_seconds": 700.0, "bytes": None}) == []
    assert evaluation.BOUNDS.keys() == evaluation.CASES.keys()


def test_unwritable_results_are_refused_first(tmp_path, capsys):
    (tmp_path / "f").touch()
    assert evaluation.main(["--json", str(tmp_path / "f" / "x.json"), "--only", "square_root"]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(evaluation.CASES))
def test_bounds_at_full_size(name):
    assert evaluation.main(["--only", name]) == 0
