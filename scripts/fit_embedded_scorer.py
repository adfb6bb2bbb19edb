"""Fit the scorer that ships with the package to its scored captions, and save it with a report.

    python scripts/fit_embedded_scorer.py [--captions captions.jsonl] [--out DIR]

Without arguments it updates the files in cat_fast/complexity/assets. The same captions give the same arrays.
"""

import argparse
import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import scipy
import sklearn

from cat_fast.complexity.captions import SCORED_CAPTIONS, read_scored
from cat_fast.complexity.embedded_scorer import REPORT_FILE, SCORER_FILE
from cat_fast.complexity.fitting import fit
from cat_fast.data.files import atomic_write


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--captions", type=Path, default=SCORED_CAPTIONS, help="JSON lines with caption and score"
    )
    parser.add_argument(
        "--out", type=Path, default=SCORER_FILE.parent, help="folder for the scorer and its report"
    )
    args = parser.parse_args()

    descriptions, scores = read_scored(args.captions)
    fitted = fit(descriptions, scores)
    fitted.scorer.save(args.out / SCORER_FILE.name)
    report = fitted.report() | {
        "captions_sha256": hashlib.sha256(args.captions.read_bytes()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }
    text = json.dumps(report, indent=2)
    with atomic_write(args.out / REPORT_FILE.name) as part:
        part.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
