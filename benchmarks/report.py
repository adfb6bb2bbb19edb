"""Report of a folder of results: report.md, report.html and plots.

    python -m benchmarks.report DIR [--out DIR]

DIR is written by `python -m benchmarks.run`, or benchmarks/results. Of each benchmark, the newest result is
shown with its file, command, machine, commit and load. Failed and missing benchmarks of the suite are listed
first. Figures that are not measured are marked as counted, bound or predicted. Links to results and plots are
relative, so that report.md can be read where it is committed.
"""

import argparse
import ast
import io
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from markdown_it import MarkdownIt

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from PIL import Image

from benchmarks.documents.tables import markdown
from benchmarks.run import FINISHED, MISSING, SUITES, recorded
from benchmarks.shared.committed import NAME, is_quick, machine_slug, newest, read
from benchmarks.shared.headlines import found_in
from benchmarks.shared.result_tables import TABLES
from cat_fast import console
from cat_fast.data.files import atomic_write
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:90em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}"
    "td,th{border-bottom:1px solid #ddd;padding:.25em .7em;text-align:left;vertical-align:top;max-width:34em}"
    "td:nth-child(n+2){font-variant-numeric:tabular-nums}img{max-width:100%}"
)
NATURE = {
    "claims": "Counted figures do not depend on the machine; measured ones name their file. In the comparison"
    " with fixed ratios, bounds and predictions are from data sheets.",
    "roofline": "Bounds and predictions from data sheets; nothing here was measured but in columns named so.",
    "scaling": "Predicted from data sheets, not measured.",
    "launches": "Counted; independent of the machine.",
    "gpu_static": "Read from compiled code; nothing ran on a GPU.",
    "serving_simulation": "Predicted by a queue model, not measured.",
    "straggler": "Costs of steps are measured; the ranks are simulated.",
}
"""Origin of the figures of benchmarks that do not only measure."""
DESCRIBED_BY = {"serving_simulation": "serving"}
"""Script of results that are named otherwise."""
MAX_ROWS = 30
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
PALETTE = [
    *((grey, grey, grey) for grey in (0, 85, 136, 200, 255)),
    *(tuple(255 * part for part in to_rgb(colour)) for colour in COLOURS),
]
"""Colours of a plot's file: few, so that it is small."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Newest result of a benchmark."""

    path: Path
    content: Mapping[str, Any]

    @property
    def about(self) -> Mapping[str, Any]:
        """Description of the machine and the run; empty where the benchmark writes none."""
        return self.content.get("about", {})

    @property
    def machine(self) -> str:
        """Short name of the machine."""
        match = NAME.fullmatch(self.path.name)
        return machine_slug(self.about) if "cpu" in self.about else match["machine"] if match else "unknown"

    @property
    def date(self) -> str:
        match = NAME.fullmatch(self.path.name)
        return self.about.get("date") or (match["date"] if match else "no date")


def results_in(folder: Path) -> dict[str, Result]:
    """Return the newest result of each benchmark.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    found = {
        name: Result(path=path, content=read(path))
        for name, path in newest(folder.glob("*.json")).items()
        if name != "run"
    }
    if not found:
        raise UserError(f"{folder}: expected results named MODEL_MACHINE_DATE.json, found none")
    return found


def compose(
    results: Mapping[str, Result], jobs: Sequence[Mapping[str, Any]], out: Path, plots: Mapping[str, str]
) -> str:
    """Return the report in Markdown.

    Args:
        results: newest result of each benchmark.
        jobs: states of the benchmarks of a suite.
        out: folder of the report, to which links are relative.
        plots: file names of the plots by benchmark.
    """
    text = ["# Benchmarks", _origins(results)]
    text += ["## In short", in_short(results, out)]
    text += ["## Machines", machines(results)]
    text += ["## Runs", run_states(results, jobs)]
    states = {job["name"]: job for job in jobs}
    for name in sorted(set(results) & set(TABLES), key=list(TABLES).index):
        result = results[name]
        text += [f"## {name}", f"{description(name)} {NATURE.get(name, 'Measured.')}"]
        text += [origin(result, states.get(name, {}), out), *tables(name, result)]
        if name in plots:
            text.append(f"![Speed-ups of {name}]({plots[name]})")
    others = [
        (f"[{name}]({_link(result.path, out)})", result.machine, result.date)
        for name, result in results.items()
        if name not in TABLES
    ]
    if others:
        note = "Results that no suite measures; the documents of their subjects have the tables."
        text += ["## Other results", note, markdown(("result", "machine", "date"), others)]
    return "\n\n".join(block.strip() for block in text) + "\n"


def _origins(results: Mapping[str, Result]) -> str:
    commits = sorted({result.about["commit"] for result in results.values() if result.about.get("commit")})
    of = f"Results of commits {', '.join(commits)}." if commits else "The results record no commit."
    return f"Written by `python -m benchmarks.report`. {of} Ranges in parentheses are quartiles."


def in_short(results: Mapping[str, Result], out: Path) -> str:
    """Return one row per headline that the results have; rough results have none."""
    found = found_in(
        {name: result.content for name, result in results.items() if not is_quick(result.content)}
    )
    if not found:
        return "None of the results has a comparison of `benchmarks/shared/headlines.py`."
    rows = [
        (
            headline.text,
            f"{value:.3g}",
            f"[{headline.benchmark}]({_link(results[headline.benchmark].path, out)})",
        )
        for headline, value in found
    ]
    return markdown(("measured comparison", "times as fast or as many", "result"), rows)


def machines(results: Mapping[str, Result]) -> str:
    """Return one row per machine and set of packages, with the results that came from it."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, result in results.items():
        about = result.about if "cpu" in result.about else result.content.get("machine", {})
        if "cpu" not in about:
            continue
        cpu = about["cpu"]
        gpus = ", ".join(str(gpu["name"] if isinstance(gpu, Mapping) else gpu) for gpu in about["gpus"])
        packages = ", ".join(f"{package} {v}" for package, v in about["packages"].items() if v)
        features = (cpu.get("instruction_set") or cpu["capability"]).upper()
        row = (f"{cpu['processor']}, {features}", f"{cpu['threads']}", gpus or "none", about["python"])
        groups[*row, packages].append(name)
    rows = [(*row, ", ".join(names)) for row, names in groups.items()]
    return markdown(("processor", "threads", "GPUs", "Python", "packages", "results"), rows)


def run_states(results: Mapping[str, Result], jobs: Sequence[Mapping[str, Any]]) -> str:
    """Return the state of each benchmark of the suite, those with a problem first."""
    known = {job["name"] for job in jobs} | set(results)
    absent = [] if jobs else [job.name for job in SUITES["cpu"] if job.name not in known]
    listed = [*jobs, *({"name": name, "state": MISSING} for name in absent)]
    rows = [
        (
            job["name"],
            job["state"] + (", kept from an earlier call" if job.get("kept") else ""),
            f"{job['seconds'] / 60:.1f}" if job.get("seconds") is not None else "",
            f"{job['exit_code']}" if job.get("exit_code") else "",
        )
        for job in sorted(listed, key=lambda job: job["state"] == FINISHED)
    ]
    if not rows:
        return "Every benchmark of the suite has a result."
    return markdown(("benchmark", "state", "minutes", "exit code"), rows)


def description(name: str) -> str:
    """Return the first paragraph of the benchmark's docstring."""
    script = Path(__file__).with_name(f"{DESCRIBED_BY.get(name, name)}.py")
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def origin(result: Result, job: Mapping[str, Any], out: Path) -> str:
    """Return a line with file, machine, date, commit, load and command of a result."""
    about = result.about
    parts = [f"File [{result.path.name}]({_link(result.path, out)})", f"{result.machine}, {result.date}"]
    parts += [f"commit {about['commit']}"] if about.get("commit") else []
    if "load_before" in about:
        loads = (about.get(name) for name in ("load_before", "load_after"))
        parts.append("load " + " to ".join(f"{load:.3g}" for load in loads if load is not None))
    if job.get("file") == result.path.name:
        parts += [f"`{job['command']}`"] if job.get("command") else []
        parts += [f"{job['seconds']:,.0f} s"] if job.get("seconds") is not None else []
    return "; ".join(parts) + "."


def tables(name: str, result: Result) -> list[str]:
    """Return the tables of a result, or a sentence on one that has another format."""
    try:
        return TABLES[name](result.content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"The file has another format ({type(error).__name__}: {error}); measure again."]


def plot(content: Mapping[str, Any], title: str) -> bytes | None:
    """Return a PNG of the speed-ups over each baseline, None if there are none.

    Up to `MAX_ROWS` cases have a row each; of more, those of the same first word share one.
    """
    cases = {
        key: case["ratios"]
        for key, case in content.get("cases", {}).items()
        if isinstance(case, Mapping) and case.get("ratios")
    }
    if not cases:
        return None
    rows = {key: key if len(cases) <= MAX_ROWS else key.split(".")[0] for key in cases}
    places = {row: -number for number, row in enumerate(dict.fromkeys(rows.values()))}
    baselines = list(dict.fromkeys(name for ratios in cases.values() for name in ratios))
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(places)), layout="constrained")
    for number, name in enumerate(baselines):
        found = [(places[rows[key]], ratios[name]) for key, ratios in cases.items() if name in ratios]
        y = [place - 0.08 * (number - (len(baselines) - 1) / 2) for place, _ in found]
        colour = COLOURS[number % len(COLOURS)]
        axes.hlines(y, [r["low"] for _, r in found], [r["high"] for _, r in found], colour)
        axes.plot([r["median"] for _, r in found], y, "o", color=colour, markersize=4, label=f"over {name}")
    axes.axvline(1, color="#888", linewidth=1)
    axes.set_yticks(list(places.values()), list(places), fontsize=8)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in TICKS if low <= tick <= high], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"{title}: speed-ups, medians and quartiles", fontsize=10)
    axes.legend(fontsize=8, loc="best")
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=66)
    pyplot.close(figure)
    image = Image.open(drawn).convert("RGB")
    palette = Image.new("P", (1, 1))
    palette.putpalette([int(value) for colour in PALETTE for value in colour])
    reduced = image.quantize(palette=palette, dither=Image.Dither.NONE)
    reduced.save(small, format="PNG", optimize=True)
    return small.getvalue()


def as_html(text: str) -> str:
    """Convert the report's Markdown to a page."""
    head = f"<!doctype html><meta charset=utf-8><title>Benchmarks</title><style>{STYLE}</style>"
    return f"{head}\n{MarkdownIt('commonmark', {'html': False}).enable('table').render(text)}"


def _link(path: Path, out: Path) -> str:
    return Path(os.path.relpath(path.resolve(), out.resolve())).as_posix()


def write(folder: Path, out: Path) -> Iterator[Path]:
    """Write the plots and the report, and yield each file."""
    plots = {}
    results, jobs = results_in(folder), recorded(folder)
    out.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        if name in TABLES and (drawn := plot(result.content, name)):
            plots[name] = f"report_{name}.png"
            yield _written(out / plots[name], drawn)
    text = compose(results, jobs, out, plots)
    yield _written(out / "report.html", as_html(text).encode())
    yield _written(out / "report.md", text.encode())


def _written(path: Path, content: bytes) -> Path:
    with atomic_write(path) as part:
        part.write_bytes(content)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of results")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report; DIR by default")
    given = parser.parse_args(arguments)
    out = given.out or given.folder
    try:
        for path in write(given.folder, out):
            print(path)
    except (UserError, OSError) as error:
        console.print_error(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
