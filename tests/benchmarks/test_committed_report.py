"""The committed report is what `python -m benchmarks.report` makes of the committed results."""

from pathlib import Path

from benchmarks import report
from benchmarks.run import recorded
from benchmarks.shared.committed import FOLDER
from benchmarks.shared.result_tables import TABLES

REPORT = Path(__file__).parents[2] / "docs" / "benchmarks"


def test_it_is_made_from_the_results_with_a_plot_of_each_that_has_speed_ups():
    plots = {path.stem.removeprefix("report_"): path.name for path in REPORT.glob("report_*.png")}
    results = report.results_in(FOLDER)
    made = report.compose(results, recorded(FOLDER), REPORT, plots)
    assert made == (REPORT / "report.md").read_text(encoding="utf-8")
    contents = {name: result.content for name, result in results.items() if name in TABLES}
    with_ratios = {
        name
        for name, content in contents.items()
        if any(isinstance(case, dict) and case.get("ratios") for case in content.get("cases", {}).values())
    }
    assert plots.keys() == with_ratios
