"""The report of a folder: machine and runs, a section per benchmark, plots; as Markdown and HTML."""

import json
import re

import pytest

from benchmarks import checkpoints, report, run, startup, training_steps
from benchmarks.shared.committed import FOLDER
from benchmarks.shared.headlines import HEADLINES
from benchmarks.shared.result_tables import TABLES
from benchmarks.shared.steps import Step

CPU = {"processor": "AMD EPYC", "capability": "AVX512", "threads": 2}
ABOUT = {
    "date": "2026-11-29", "cpu": CPU, "gpus": [], "python": "3.11", "packages": {"torch": "2.14"},
    "commit": "abc1234", "load_before": 1.25, "load_after": 2.0,
}  # fmt: skip
LINK = re.compile(r"\]\(([^)]+)\)")


def spread(value):
    return {"median": value, "low": 0.9 * value, "high": 1.1 * value}


def case(**changes):
    found = {
        "right": True,
        "errors": {"ours": 1e-6},
        "seconds": {"ours": spread(0.001)},
        "ratios": {"eager": spread(2.0)},
        "rates": {"tokens": 5.0},
        "work": {"gflops_per_second": 200.0},
        "peak_bytes": {"ours": 2**20},
    }
    return found | changes


def write(folder, name, content):
    (folder / f"{name}_amd-epyc-2t_2026-11-29.json").write_text(json.dumps({"about": ABOUT, **content}))


def made(folder, tmp_path):
    assert report.main([str(folder), "--out", str(tmp_path / "out")]) == 0
    return tuple((tmp_path / "out" / name).read_text() for name in ("report.md", "report.html"))


def test_every_benchmark_of_every_suite_has_a_section():
    assert {job.name for jobs in run.SUITES.values() for job in jobs} <= set(TABLES)


def test_the_committed_results_make_a_complete_and_small_report(tmp_path, capsys):
    text, page = made(FOLDER, tmp_path)
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    found = {section.partition("\n")[0]: section for section in sections}
    models = set(report.results_in(FOLDER))
    assert models & set(TABLES) <= set(found)
    assert "another format" not in text
    assert all("\n| --- |" in found[name] for name in models & set(TABLES))
    for link in LINK.findall(text):
        assert (tmp_path / "out" / link).exists(), link
    assert "fixed 8x | fixed 16x | fixed 32x | CAT" in found["claims"], "the reviewers' table"
    plots = list((tmp_path / "out").glob("*.png"))
    assert {plot.name for plot in plots} >= {"report_kernels.png", "report_packing.png"}
    assert max(plot.stat().st_size for plot in plots) < 15_000
    assert sum(plot.stat().st_size for plot in plots) < 100_000
    assert page.count("<img ") == len(plots)
    assert "evaluation" in found["Other results"]
    measured = [one for one in HEADLINES if one.benchmark in models]
    assert found["In short"].count(".json") == len(measured)


def test_sections_name_file_machine_commit_load_and_command(tmp_path):
    wrong = case(right=False, errors={"ours": 0.5}, seconds={}, ratios={})
    failed = case(right=False, errors={}, failures={"ours": "RuntimeError: out of memory"})
    write(tmp_path, "kernels", {"cases": {"a.forward": case(), "<b>": wrong, "c": failed}})
    write(tmp_path, "startup", startup.measure(True, lambda command: 1.5))
    jobs = [
        {"name": "kernels", "state": run.FINISHED, "seconds": 90, "kept": True, "exit_code": 0,
         "file": "kernels_amd-epyc-2t_2026-11-29.json", "command": "python -m benchmarks.kernels"},
        {"name": "startup", "state": run.FINISHED, "file": "startup_amd-epyc-2t_2026-11-29.json"},
        {"name": "loader", "state": run.FAILED, "seconds": 60, "exit_code": 2},
        {"name": "serving", "state": run.MISSING},
    ]  # fmt: skip
    (tmp_path / run.RECORD).write_text(json.dumps({"jobs": jobs}))
    text, page = made(tmp_path, tmp_path)
    row = "| a.forward | 1 (0.9 to 1.1) | 1e-06 | 2 (1.8 to 2.2) × eager | 5 tokens/s, 200 GFLOP/s | 1 |"
    assert row in text
    origin = (
        "[kernels_amd-epyc-2t_2026-11-29.json](../kernels_amd-epyc-2t_2026-11-29.json); amd-epyc-2t, "
        "2026-11-29; commit abc1234; load 1.25 to 2; `python -m benchmarks.kernels`; 90 s."
    )
    assert origin in text
    assert "| AMD EPYC, AVX512 | 2 | none | 3.11 | torch 2.14 | kernels, startup |" in text
    assert "| loader | failed | 1.0 | 2 |\n| serving | missing |  |  |\n| kernels | finished, kept" in text
    assert re.search(r"<td>&lt;b&gt;</td>\s*<td>WRONG", page)
    assert "| c | ours failed: RuntimeError: out of memory |" in text
    assert '<a href="../kernels_amd-epyc-2t_2026-11-29.json">' in page
    assert report.main([str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(("about", "shown"), [({}, True), ({"effort": {"min_pairs": 1}}, False)])
def test_the_short_comparisons_are_not_those_of_rough_results(tmp_path, about, shown):
    write(tmp_path, "packing", {"216.ratio_vs_padded": 1.5, "cases": {}, "about": ABOUT | about})
    text, _ = made(tmp_path, tmp_path)
    in_short = text.split("## In short")[1].split("## ")[0]
    assert ("| the same images packed against padded | 1.5 |" in in_short) == shown
    assert ("None of the results has a comparison" in in_short) == (not shown)


def test_benchmarks_without_committed_results_have_tables(tmp_path):
    step = Step(run=lambda: None, images=4, tokens=1024, flops=8e12, precision="bf16")
    total = training_steps.total({"denoise": 10}, {"denoise": step}, {"denoise": [2.0]})
    one = training_steps.figures(step, [2.0]) | {"peak_bytes": {"ours": 3 * 2**20}}
    write(tmp_path, "training_steps", {"cases": {"cat_xl": one, "generate.mix": total}})
    sizes = {"nano": checkpoints.summary([(1.0, 2.0, 10**6)])}
    write(tmp_path, "checkpoints", {"checkpoints": sizes})
    write(tmp_path, "startup", startup.measure(True, lambda command: 1.5))
    base = {"model": "transformer", "predicted": 0.5, "within": False}
    row = base | {"configuration": "another mix", "stage": 2, "measured": 0.4, "error": 0.25}
    failed = base | {"configuration": "another width", "stage": 3, "failed": "out of memory"}
    write(tmp_path, "scaling_validation", {"rows": [row, failed]})
    write(tmp_path, "loader", {"cases": {"old": {"right": True}}})
    text, _ = made(tmp_path, tmp_path)
    assert "| cat_xl | bf16 | 4 | 2 (2 to 2) | 2 | 512 | 2,000 | 4,000 | 3 | no known peak |" in text
    assert "| generate.mix | bf16 | 1 | 5 (5 to 5) | 0.2 |  | 20,000 | 4,000 |  | no known peak |" in text
    assert "| nano | 1 | 1 | 2 | 1 | 0.5 |" in text
    assert "| `cat-fast info` | 1.5 (1.5 to 1.5) |" in text
    assert "| transformer | another mix | 2 | 500.0 | 400.0 | +25% | MISS |" in text
    assert "| transformer | another width | 3 | 500.0 | FAILED |  | MISS |" in text
    assert "The file has another format (KeyError: 'ratios'); measure again." in text
    assert "| packing | missing |" in text


@pytest.mark.parametrize("count", [1, report.MAX_ROWS + 1])
def test_a_plot_has_no_more_rows_than_can_be_read(count, monkeypatch):
    rows = []
    monkeypatch.setattr(
        report.pyplot.Axes, "set_yticks", lambda self, places, labels, **options: rows.extend(labels)
    )
    cases = {f"op.{number}": case() for number in range(count)}
    assert report.plot({"cases": cases}, "kernels").startswith(b"\x89PNG")
    assert rows == ["op.0"] if count == 1 else ["op"]
    assert report.plot({"cases": {"a": {"seconds": 1.0}}}, "evaluation") is None
