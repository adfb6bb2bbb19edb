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


def format_value(value: Value) -> str:
    """Return a figure with at least four significant digits, or a dash."""
    if value is None:
        return "—"
    if isinstance(value, str):
        return value
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"


def notes(table: Table) -> list[str]:
    """Return source, conflicts and, where we have no row, the command that makes one."""
    found = [f"Published: {table.source}.", *(f"Conflict: {conflict}" for conflict in table.conflicts)]
    if not table.has_ours:
        found.append(f"Our row needs weights or data: {table.command}")
    return found


def _markdown(table: Table) -> str:
    lines = [
        f"**{table.title}**",
        "",
        _cells(["", *table.columns]),
        _cells(["---"] * (len(table.columns) + 1)),
        *(_cells([row.name, *map(format_value, row.values)]) for row in table.rows),
        "",
        *(f"- {_code(note)}" for note in notes(table)),
    ]
    return "\n".join(lines) + "\n"


def _code(note: str) -> str:
    start, separator, command = note.partition("cat-fast ")
    return f"{start}`cat-fast {command}`" if separator and note.startswith("Our row") else note


def _cells(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _latex(table: Table) -> str:
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\hline",
        " & ".join(map(_escape, ["", *table.columns])) + r" \\",
        r"\hline",
        *(
            " & ".join(map(_escape, [row.name, *map(format_value, row.values)])) + r" \\"
            for row in table.rows
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
    writer.writerow(["row", "published", *table.columns])
    for row in table.rows:
        values = ["" if value is None else value for value in row.values]
        writer.writerow([row.name, "yes" if row.is_published else "no", *values])
    return file.getvalue()


def _html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in ("", *table.columns))
    body = "\n".join(
        f'<tr class="{"published" if row.is_published else "ours"}"><th>{html.escape(row.name)}</th>'
        + "".join(f"<td>{html.escape(format_value(value))}</td>" for value in row.values)
        + "</tr>"
        for row in table.rows
    )
    listed = "\n".join(f"<li>{html.escape(note)}</li>" for note in notes(table))
    style = (
        "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}"
        "th,td{padding:4px 10px;text-align:right;border-bottom:1px solid #ddd}"
        "th:first-child{text-align:left}tr.ours{background:#eef6ff}"
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
