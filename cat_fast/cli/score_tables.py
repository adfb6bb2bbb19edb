"""Tables and messages of `cat-fast score`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from cat_fast import console

if TYPE_CHECKING:
    from cat_fast.complexity.scoring_run.report import ScoreSummary
    from cat_fast.complexity.scoring_run.rows import ScoringResult

Effects = Callable[[dict[str, Any]], str]
"""Returns the reasons for the score in a row."""


def print_scores(result: "ScoringResult", summary: "ScoreSummary", effects: Effects | None) -> None:
    """Print the first rows, and the mix of ratios and cost of all."""
    if summary.rows:
        console.out.print(_table(summary.rows, effects, result.noun))
    if (more := result.rows - len(summary.rows)) > 0:
        console.out.print(f"and {more:,} more")
    cost, settings = summary.cost(), result.settings
    line = _number_of(result, result.rows)
    if cost:
        mix = ", ".join(f"{ratio}x {share:.0%}" for ratio, share in cost["mix"].items())
        mean, fixed = cost["mean_tokens"], cost["fixed_16x_tokens"]
        line += f": {mix}; mean {mean:.1f} tokens against {fixed} at a fixed 16x ({mean / fixed - 1:+.1%})"
    a, b = settings.thresholds
    line += f"; thresholds {a},{b}"
    if settings.mean_tokens is not None:
        line += f"; budget {settings.mean_tokens:g} tokens"
    if result.rows > len(summary.rows) and result.scored:
        line += f"; {result.scored:,} scored in {result.seconds:.3g} s"
    console.out.print(line)


def print_failures(result: "ScoringResult", summary: "ScoreSummary") -> None:
    """Print unusable inputs and failed samples by name to standard error, and their number."""
    for problem in result.problems:
        _warn(problem)
    for row in summary.failures:
        _warn(f"not scored: {row['key']}: {row['error']}")
    if (more := result.failed - len(summary.failures)) > 0:
        _warn(f"not scored: {more:,} more (the column error has the reasons)")
    if result.failed or result.problems:
        files = f"{len(result.problems):,} file{'s' * (len(result.problems) != 1)}"
        _warn(f"failed: {result.failed:,} of {_number_of(result, result.rows)}, {files}")


def _number_of(result: "ScoringResult", count: int) -> str:
    return f"{count:,} {result.noun}{'s' * (count != 1)}"


def _table(rows: list[dict[str, Any]], effects: Effects | None, noun: str) -> Table:
    images = noun == "image"
    table = Table(*["image"] * images, "caption", "flags")
    for column in ("score", "ratio", "tokens"):
        table.add_column(column, justify="right")
    if effects:
        table.add_column("largest effects")
    for row in rows:
        flags = ["text"] * bool(row["has_text"]) + ["faces"] * bool(row["has_faces"])
        caption = row["caption"] or ("" if images else row["key"])
        cells = [*[row["key"]] * images, caption, " ".join(flags)]
        if row["error"] is None:
            cells += [str(row["score"]), f"{row['ratio']}x", str(row["tokens"])]
        else:
            cells += ["-", "-", "-"]
        cells += [effects(row)] if effects else []
        table.add_row(*map(Text, cells))  # Text, so that brackets in a caption are not parsed as markup
    return table


def _warn(line: str) -> None:
    console.err.print(Text(" ".join(line.split())), soft_wrap=True)
