"""Tables as Markdown, LaTeX, CSV and HTML."""

import csv
import html
import io
from collections.abc import Callable

from cat_fast.errors import UserError
from cat_fast.evaluation.published.tables import Table, Value

_LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "²": r"\textsuperscript{2}"}


def format_table(table: Table, kind: str) -> str:
    """Return a table in a format of `FORMATS`, with its source and conflicts.

    Raises:
        UserError: an unknown format.
    """
    if kind not in FORMATS:
        raise UserError(f"--format {kind}: expected {', '.join(FORMATS)}")
    return FORMATS[kind](table)


def cells(table: Table) -> list[list[str]]:
    """Return the figures of each row as text, with the decimals of the column's published figures."""
    decimals = [
        max((_decimals(row.values[number]) for row in table.rows if row.is_published), default=0)
        if any(row.values[number] is not None for row in table.rows if row.is_published)
        else None
        for number in range(len(table.columns))
    ]
    return [
        [format_value(value, places) for value, places in zip(row.values, decimals, strict=True)]
        for row in table.rows
    ]


def format_value(value: Value, decimals: int | None = None) -> str:
    """Return a figure with that number of decimals, or with four significant digits; a dash without one."""
    if value is None:
        return "—"
    if isinstance(value, str):
        return value
    if decimals is None:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.{decimals}f}"


def _decimals(value: Value) -> int:
    if not isinstance(value, float):
        return 0
    return len(f"{value:g}".partition(".")[2])


def notes(table: Table) -> list[str]:
    """Return source, conflicts and, without comparable figures of ours, the command that measures them."""
    found = [f"Published: {table.source}.", *(f"Conflict: {conflict}" for conflict in table.conflicts)]
    if not table.has_comparable:
        missing = "Our figures on the published data need" if table.has_ours else "Our row needs"
        found.append(f"{missing} weights or data: {table.command}")
    return found


def _markdown(table: Table) -> str:
    lines = [
        f"**{table.title}**",
        "",
        _cells(["", *table.columns]),
        _cells(["---"] * (len(table.columns) + 1)),
        *(_cells([row.name, *values]) for row, values in zip(table.rows, cells(table), strict=True)),
        "",
        *(f"- {_code(note)}" for note in notes(table)),
    ]
    return "\n".join(lines) + "\n"


def _code(note: str) -> str:
    start, separator, command = note.partition("cat-fast ")
    return f"{start}`cat-fast {command}`" if separator and note.startswith("Our ") else note


def _cells(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _latex(table: Table) -> str:
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\hline",
        " & ".join(map(_escape, ["", *table.columns])) + r" \\",
        r"\hline",
        *(
            " & ".join(map(_escape, [row.name, *values])) + r" \\"
            for row, values in zip(table.rows, cells(table), strict=True)
        ),
        r"\hline",
        r"\end{tabular}",
        *(f"% {note}" for note in (table.title, *notes(table))),
    ]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text).replace("—", "--")


def _csv(table: Table) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "row", "published", *table.columns])
    for row in table.rows:
        values = ["" if value is None else value for value in row.values]
        writer.writerow([table.name, row.name, "yes" if row.is_published else "no", *values])
    return file.getvalue()


def _html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in ("", *table.columns))
    body = "\n".join(
        f'<tr class="{"published" if row.is_published else "ours"}"><th>{html.escape(row.name)}</th>'
        + "".join(f"<td>{html.escape(value)}</td>" for value in values)
        + "</tr>"
        for row, values in zip(table.rows, cells(table), strict=True)
    )
    listed = "\n".join(f"<li>{html.escape(note)}</li>" for note in notes(table))
    style = (
        "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}"
        "th,td{padding:4px 10px;text-align:right;border-bottom:1px solid #ddd}"
        "th:first-child{text-align:left;white-space:nowrap}tr.ours{background:#eef6ff}"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(table.title)}</title><style>{style}</style></head><body>\n<h1>{html.escape(table.title)}</h1>\n<table>\n<tr>{head}</tr>\n"
        f"{body}\n</table>\n<ul>\n{listed}\n</ul>\n</body></html>\n"
    )


FORMATS: dict[str, Callable[[Table], str]] = {
    "markdown": _markdown,
    "latex": _latex,
    "csv": _csv,
    "html": _html,
}
