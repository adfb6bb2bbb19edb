"""Comparison of two results: changes beyond the noise band are reported, others are not."""

import json

import pytest

from benchmarks import compare

MACHINE = {"cpu": {"processor": "A", "threads": 2}, "gpus": []}


def results(seconds, spread=0.01, **about):
    ours = {"median": seconds, "low": seconds * (1 - spread), "high": seconds * (1 + spread)}
    return {
        "cases": {"k.forward": {"right": True, "seconds": {"ours": ours}}},
        "about": {"benchmark": "k", **MACHINE, **about},
    }


def write(folder, name, content):
    path = folder / name
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("after", "spread", "verdict"),
    [
        (1.1, 0.01, compare.SLOWER),
        (1.1, 0.08, compare.SAME),
        (1.015, 0.0, compare.SAME),
        (0.8, 0.01, compare.FASTER),
    ],
)
def test_quartiles_give_the_band_where_there_are_no_rounds(after, spread, verdict):
    (change,) = compare.compare(results(1.0, spread), results(after, spread))
    assert change.verdict == verdict
    assert change.relative == pytest.approx(after - 1)
    assert not change.from_rounds


def test_rounds_of_the_same_code_give_the_band():
    rounds = [results(1.0), results(0.88), results(1.05)]
    (change,) = compare.compare(results(1.0), results(1.1), rounds)
    assert change.band == pytest.approx(1 / 0.88 - 1)
    assert change.verdict == compare.SAME
    (change,) = compare.compare(results(1.0), results(1.2), rounds)
    assert change.verdict == compare.SLOWER


def test_rounds_of_a_suite_are_found_next_to_its_results(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, seconds in ((a, 1.0), (a / "again_1", 1.3), (b, 1.2)):
        folder.mkdir()
        write(folder, "k_a-2t_2026-01-01.json", results(seconds))
    assert compare.main([str(a), str(b)]) == 0
    assert "noise 30.0% by A/A" in capsys.readouterr().out


def test_the_command_fails_on_a_regression_and_compares_no_other_machine(tmp_path, capsys):
    a = write(tmp_path, "k_a-2t_2026-01-01.json", results(1.0))
    b = write(tmp_path, "k_a-2t_2026-01-02.json", results(1.5))
    out = tmp_path / "changes.json"
    assert compare.main([a, b, "--json", str(out)]) == 1
    assert "slower  +50.0%" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())["k"]
    assert row["verdict"] == "slower"
    assert compare.main([a, a]) == 0
    assert compare.main([a, b, "--noise", write(tmp_path, "r.json", results(1.6))]) == 0
    other = results(1.0, cpu={"processor": "B", "threads": 2})
    assert compare.main([a, write(tmp_path, "k_b-2t_2026-01-02.json", other)]) == 2
    assert "measured on different machines" in capsys.readouterr().err
    assert compare.main([a, str(tmp_path / "none.json")]) == 2
