"""Write the figures of a nano report into the cards of the shipped models and the tables of the demo.

python -m benchmarks.nano_figures runs/nano_report/report.json
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.nano.cards import update_figures


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the figures of a nano report into the model cards.")
    parser.add_argument("report", type=Path, help="report.json of make nano-report")
    given = parser.parse_args()
    try:
        update_figures(json.loads(given.report.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # a UserError, too
        print("error:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
