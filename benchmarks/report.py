"""Report of a folder of results: report.html, report.md and plots.

    python -m benchmarks.report DIR [--out DIR]

DIR is written by `python -m benchmarks.run`, or benchmarks/results. For each benchmark, the newest result is
shown: times and speed-ups of measured cases, counted claims, and bounds. Figures that are not measured are
marked as counted, bound or predicted.
"""

import argparse
import html
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks import roofline
from benchmarks.compare import load
from benchmarks.shared.committed import machine_slug
from cat_fast import console
from cat_fast.data.files import atomic_write
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}"
    "td,th{border-bottom:1px solid #ddd;padding:.25em .7em;text-align:left;white-space:nowrap}"
    "td:nth-child(n+2){font-variant-numeric:tabular-nums}pre{overflow-x:auto;background:#f6f6f6;padding:1em}"
    "img{max-width:100%}.note{color:#666}"
)
Table = tuple[Sequence[str], list[Sequence[str]]]


def sections(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, Table | str]]:
    """Yield (title, note, table or text) per benchmark."""
    for name, content in results.items():
        about = content.get("about", {})
        if name == "claims":
            note = "Counted figures do not depend on the machine; measured ones name their file."
            yield "Efficiency claims", note, claim_table(content)
        elif name == "roofline":
            note = (
                "Bounds and predictions from data sheets; nothing here was measured but in columns named so."
            )
            tables = [*roofline.lines(content), "", *roofline.compiled_lines(content)]
            yield "Bounds on GPUs", note, "\n".join(tables)
        elif any("seconds" in case for case in content.get("cases", {}).values()):
            where = machine_slug(about) if "cpu" in about else "an unnamed machine"
            yield name, f"Measured on {where}, {about.get('date', 'no date')}.", case_table(content)
        else:
            figures = {k: v for k, v in content.items() if isinstance(v, int | float | str)}
            if not figures:
                continue
            scalars: list[Sequence[str]] = [(key, _cell(value)) for key, value in figures.items()]
            yield name, about.get("date", ""), (("figure", "value"), scalars)


def case_table(content: Mapping[str, Any]) -> Table:
    """Return milliseconds, speed-ups, rates and peak memory of each case."""
    rows: list[Sequence[str]] = []
    for key, case in content["cases"].items():
        if not case.get("right", True):
            rows.append((key, "WRONG", "", "", ""))
            continue
        ratios = ", ".join(f"{r['median']:.3g} x {name}" for name, r in case.get("ratios", {}).items())
        rates = ", ".join(f"{value:.4g} {name}/s" for name, value in case.get("rates", {}).items())
        peak = (case.get("peak_bytes") or {}).get("ours")
        rows.append(
            (
                key,
                f"{case['seconds']['ours']['median'] * 1e3:.4g}",
                ratios,
                rates,
                "" if peak is None else f"{peak / 2**20:.0f}",
            )
        )
    return ("case", "ms", "as fast as", "rate", "peak MiB"), rows


def claim_table(content: Mapping[str, Any]) -> Table:
    """Return published, counted and measured figures of each claim."""
    rows: list[Sequence[str]] = [
        (
            row["claim"],
            row["unit"],
            _cell(row["published"]),
            _cell(row["counted"]),
            "" if row["measured"] is None else f"{row['measured']['value']:.4g} ({row['measured']['file']})",
            row["explanation"],
        )
        for group in content["claims"].values()
        for row in group
    ]
    return ("claim", "unit", "published", "counted", "measured", "difference"), rows


def plot(content: Mapping[str, Any], title: str, path: Path) -> bool:
    """Draw the speed-ups of all cases over their baselines; return False if there are none."""
    bars = [
        (f"{key} vs {name}", ratio["median"], ratio["low"], ratio["high"])
        for key, case in content.get("cases", {}).items()
        for name, ratio in (case.get("ratios") or {}).items()
    ]
    if not bars:
        return False
    figure, axes = pyplot.subplots(figsize=(9, 0.6 + 0.24 * len(bars)), layout="constrained")
    labels, medians, lows, highs = zip(*reversed(bars), strict=True)
    spread = [[m - low for m, low in zip(medians, lows, strict=True)],
              [high - m for m, high in zip(medians, highs, strict=True)]]  # fmt: skip
    axes.barh(labels, medians, xerr=spread, color="#4477aa", height=0.6, error_kw={"elinewidth": 0.8})
    axes.axvline(1.0, color="#cc3311", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as the baseline (median and quartiles)")
    axes.set_title(title)
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def write(results: Mapping[str, Mapping[str, Any]], out: Path) -> list[Path]:
    """Write the report and its plots; return the files."""
    page = [f"<!doctype html><meta charset=utf-8><title>Benchmarks</title><style>{STYLE}</style>"]
    page.append("<h1>Benchmarks</h1>")
    text, files = ["# Benchmarks"], []
    for title, note, body in sections(results):
        page += [f"<h2>{html.escape(title)}</h2>", f"<p class=note>{html.escape(note)}</p>"]
        text += ["", f"## {title}", "", note, ""]
        if isinstance(body, str):
            tables = body.split("\n\n")
            page += [_html_table(_parse(table)) for table in tables]
            text.append(body)
        else:
            page.append(_html_table(body))
            text += _markdown(body)
        image = out / f"{title.replace(' ', '_')}.png"
        if title in results and plot(results[title], title, image):
            page.append(f'<img src="{image.name}" alt="Speed-ups of {html.escape(title)}">')
            text += ["", f"![Speed-ups of {title}]({image.name})"]
            files.append(image)
    for name, content in (("report.html", "\n".join(page)), ("report.md", "\n".join(text))):
        with atomic_write(out / name) as part:
            part.write_text(content + "\n", encoding="utf-8")
        files.append(out / name)
    return files


def _markdown(table: Table) -> list[str]:
    header, rows = table
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]


def _parse(markdown: str) -> Table:
    header, _, *rows = [line.strip("| ").split(" | ") for line in markdown.strip().splitlines()]
    return header, [[cell.replace("`", "") for cell in row] for row in rows]


def _html_table(table: Table) -> str:
    header, rows = table
    head = "".join(f"<th>{html.escape(cell)}" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, int | float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of results")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report; DIR by default")
    given = parser.parse_args(arguments)
    try:
        results = load(given.folder)
        out = given.out or given.folder
        out.mkdir(parents=True, exist_ok=True)
        for path in write(results, out):
            print(path)
    except (UserError, OSError) as error:
        console.print_error(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
