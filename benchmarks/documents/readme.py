"""Table of README.md: the measured comparisons that the report begins with."""

from benchmarks import report
from benchmarks.documents import tables
from benchmarks.shared.committed import FOLDER

DOCUMENT = tables.ROOT / "README.md"


def filled(text: str) -> str:
    """Return the document with the comparisons of the committed results."""
    return tables.fill(text, {"comparisons": report.in_short(report.results_in(FOLDER), tables.ROOT)})
