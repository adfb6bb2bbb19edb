"""Comparison of two results: changes beyond the noise band are reported, others are not."""

import json

import pytest

from benchmarks import compare, run
from benchmarks.shared.committed import FOLDER, newest, read

MACHINE = {"cpu": {"processor": "A", "threads": 2}, "gpus": []}
EFFORT = {"min_pairs": 3, "max_pairs": 9, "seconds": 1.0}


def spread(value, width=0.01):
    return {"median": value, "low": value * (1 - width), "high": value * (1 + width)}


def results(seconds, width=0.01, ratio=2.0, details=None, **about):
    case = {
        "right": True,
        "seconds": {"ours": spread(seconds, width)},
        "ratios": {"eager": spread(ratio, width)},
        "details": details or {},
    }
    return {
        "cases": {"k.forward": case},
        "about": {"benchmark": "kernels", "effort": EFFORT, **MACHINE, **about},
    }


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def time_of(before, after, rounds=()):
    return compare.compare("kernels", before, after, rounds).changes[0]


@pytest.mark.parametrize(
    ("after", "width", "verdict"),
    [
        (1.1, 0.01, compare.WORSE),
        (1.1, 0.08, compare.SAME),
        (1.015, 0.001, compare.SAME),
        (0.8, 0.01, compare.BETTER),
    ],
)
def test_quartiles_give_the_band_where_there_are_no_rounds(after, width, verdict):
    change = time_of(results(1.0, width), results(after, width))
    assert change.verdict == verdict
    assert change.relative == pytest.approx(after - 1)
    assert not change.from_rounds


def test_rounds_of_the_same_code_widen_the_band_and_never_narrow_it():
    rounds = [results(1.0), results(0.88), results(1.05)]
    change = time_of(results(1.0), results(1.1), rounds)
    assert change.band == pytest.approx(1 / 0.88 - 1)
    assert change.verdict == compare.SAME
    assert time_of(results(1.0), results(1.2), rounds).verdict == compare.WORSE
    assert time_of(results(1.0, 0.08), results(1.1, 0.08), [results(1.0)]).verdict == compare.SAME


def test_ratios_to_baselines_are_compared_in_their_direction():
    found = compare.compare("kernels", results(1.0, ratio=3.0), results(1.0, ratio=2.0))
    assert [change.verdict for change in found.changes] == [compare.SAME, compare.WORSE]
    assert found.regressions == 1
    assert compare.compare("kernels", results(1.0), results(1.0, ratio=3.0)).regressions == 0


@pytest.mark.parametrize(("after", "regressions"), [(0.008, 0), (0.2, 1)])
def test_of_waiting_the_time_that_is_left_is_compared(after, regressions):
    """Twice a share of 0.4 % is noise."""
    found = compare.compare(
        "straggler", *({"cases": {"balanced.64": {"wait": wait}}} for wait in (0.004, after))
    )
    (change,) = found.changes
    assert change.case == "balanced.64 1 - wait"
    assert (change.before, change.after) == pytest.approx((0.996, 1 - after))
    assert found.regressions == regressions


def test_what_is_wrong_or_missing_in_the_newer_result_is_a_regression():
    wrong, none = results(1.0), results(1.0)
    wrong["cases"]["k.forward"] |= {"right": False, "seconds": {}, "ratios": {}}
    none["cases"] = {}
    less = results(1.0)
    less["cases"]["k.forward"]["ratios"] = {}
    for newer, failures in (
        (wrong, ["k.forward: wrong or failed in B"]),
        (none, ["k.forward seconds ours: missing in B", "k.forward ratios eager: missing in B"]),
        (less, ["k.forward ratios eager: missing in B"]),
    ):
        found = compare.compare("kernels", results(1.0), newer)
        assert found.failures == failures
        assert found.regressions == len(failures)
    assert compare.compare("kernels", none, results(1.0)).not_compared[0].endswith("missing in A")


def test_other_work_and_other_efforts_are_not_compared():
    few, many = results(1.0, details={"max_tokens": 1344}), results(9.0, details={"max_tokens": 16384})
    found = compare.compare("packing", few, many)
    assert found.not_compared == ["k.forward: other work in B: max_tokens 1344 and 16384"]
    assert (found.changes, found.failures) == ([], [])
    rough = results(1.0, effort=EFFORT | {"min_pairs": 1})
    assert "different efforts" in compare.why_not_comparable(results(1.0), rough)
    assert compare.why_not_comparable(results(1.0), results(1.0, effort=EFFORT | {"max_pairs": 3})) is None
    assert "different efforts" in compare.why_not_comparable(results(1.0), results(1.0, quick=True))
    for newer in ({"longest_extra_run": 10.0, "without": []}, {"longest_repeated_turn": None}):
        assert compare.why_not_comparable(results(1.0), results(1.0, effort=EFFORT | newer)) is None


def test_a_run_that_failed_is_a_regression_and_rounds_are_found_next_to_the_results(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    name = "kernels_a-2t_2026-01-01.json"
    write(a, name, results(1.0))
    write(a / "again_1", name, results(1.3))
    (a / "again_2").mkdir()
    write(b, name, results(1.2))
    assert compare.main([str(a), str(b)]) == 0
    assert "noise 30.0% by A/A" in capsys.readouterr().out
    write(a, "startup_a-2t_2026-01-01.json", {"seconds": {"python": spread(1.0)}, "about": MACHINE})
    assert compare.main([str(a), str(b)]) == 0
    assert "startup\n  not compared: B has no result" in capsys.readouterr().out
    jobs = [{"name": "startup", "state": run.FAILED}]
    write(b, run.RECORD, {"jobs": jobs})
    assert compare.main([str(a), str(b)]) == 1
    assert "startup\n  FAILED  failed in B" in capsys.readouterr().out
    write(b, run.RECORD, {"jobs": []})
    write(b, name, results(1.2, arguments=["--quick"]))
    assert compare.main([str(a), str(b)]) == 2
    assert "measured with different arguments ([] and ['--quick'])" in capsys.readouterr().out


def test_rounds_of_another_commit_do_not_widen_the_band(tmp_path, capsys):
    name = "kernels_a-2t_2026-01-01.json"
    a = tmp_path / "a"
    write(a, name, results(1.0, commit="abc1234"))
    write(a / "again_1", name, results(1.01, commit="abc1234"))
    write(a / "again_2", name, results(1.5, commit="def5678"))
    b = write(tmp_path, name, results(1.2, commit="def5678"))
    assert compare.main([str(a), b]) == 1
    printed = capsys.readouterr().out
    assert "worse    +20.0% (noise 2.0% by quartiles)" in printed
    assert printed.count("not compared: a round of another commit") == 1


def test_the_command_fails_on_a_regression_and_compares_no_other_machine(tmp_path, capsys):
    a = write(tmp_path, "kernels_a-2t_2026-01-01.json", results(1.0))
    b = write(tmp_path, "kernels_a-2t_2026-01-02.json", results(1.5))
    out = tmp_path / "changes.json"
    assert compare.main([a, b, "--json", str(out)]) == 1
    assert "worse    +50.0%" in capsys.readouterr().out
    assert json.loads(out.read_text())["kernels"]["changes"][0]["verdict"] == "worse"
    assert compare.main([a, a]) == 0
    noise = write(tmp_path, "kernels_a-2t_2026-01-03.json", results(1.6))
    assert compare.main([a, b, "--noise", noise]) == 0
    other = results(1.0, cpu={"processor": "B", "threads": 2})
    assert compare.main([a, write(tmp_path, "kernels_b-2t_2026-01-02.json", other)]) == 2
    printed = capsys.readouterr()
    assert "not compared: measured on different machines" in printed.out
    assert "have no figures to compare" in printed.err
    assert compare.main([a, str(tmp_path / "none.json")]) == 2


def test_the_newest_result_of_each_benchmark_is_compared_by_the_name_of_its_file(tmp_path):
    write(tmp_path, "kernels_b-2t_2026-01-01.json", {"old": 1})
    write(tmp_path, "kernels_a-2t_2026-01-02.json", {"new": 1})
    about = {"about": {"benchmark": "serving"}}
    write(tmp_path, "serving_a-2t_2026-01-01.json", {"measured": 1, **about})
    write(tmp_path, "serving_simulation_model_2026-01-01.json", {"simulated": 1, **about})
    found = compare.load(tmp_path).results
    assert found["kernels"] == {"new": 1}
    assert "measured" in found["serving"]
    assert "simulated" in found["serving_simulation"]


def test_every_timed_job_has_figures_which_the_committed_results_contain(capsys):
    timed = {job.name for jobs in run.SUITES.values() for job in jobs if not job.counted}
    assert timed - {"scaling_validation"} <= set(compare.FIGURES)
    for name, path in newest(FOLDER.glob("*.json")).items():
        if name in compare.FIGURES:
            found = {keys[-1] for keys in compare.figures(name, read(path))}
            assert len(found) > 0, name
    assert compare.main([str(FOLDER), str(FOLDER)]) == 0
    assert "worse" not in capsys.readouterr().out
