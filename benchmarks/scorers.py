"""Captions per second of the fast scorer, against the scorer of another version of this project.

    git archive VERSION cat_fast | tar -x -C FOLDER
    python -m benchmarks.scorers --former FOLDER --json FILE

Each side runs in processes of its own, one after the other in turn, with one thread. A process scores one
caption, which loads the scorer, and then the packaged rated captions, in one call and one by one; processor
time counts. Start-up is the time from the start of a process to the end of its first score; `with_startup`
divides the captions by the time of a process that loads the scorer and scores them in one call.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.shared.machine import describe
from cat_fast.complexity.rated_captions import RATED_CAPTIONS
from cat_fast.data.files import write_json

ROOT = Path(__file__).parents[1]

_PROGRAM = """
import gzip, json, sys, time
from importlib import import_module
from pathlib import Path
source, folder, count, SINGLE = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
scorer = getattr(import_module(source.partition(":")[0]), source.partition(":")[2])()
from cat_fast.complexity.description import Description
scorer.score_many([Description("a dog lying on grass", False, False)])
seconds = singly = 0.0
if count:
    lines = []
    for path in sorted(folder.glob("*.jsonl*")):
        lines += (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8")
    rows = [json.loads(line) for line in lines][:count]
    descriptions = [Description(row["caption"], row["has_text"], row["has_faces"]) for row in rows]
    start = time.process_time()
    scorer.score_many(descriptions)
    seconds = time.process_time() - start
    start = time.process_time()
    for description in descriptions[:SINGLE]:
        scorer.score_many([description])
    singly = time.process_time() - start
print(json.dumps({"seconds": seconds, "singly": singly, "torch": "torch" in sys.modules}))
"""

MODES = ("in_one_call", "one_by_one", "with_startup")
SINGLE = 500
"""Captions scored one by one."""
OURS = "cat_fast.complexity.scorers.fast.scorer:fast_scorer"


def measure(former: Path, source: str, rounds: int, count: int) -> dict[str, Any]:
    """Return throughputs and start-up times per side, and the median ratios of throughputs over the rounds.

    Args:
        former: folder with the package of the other version.
        source: MODULE:FUNCTION in that version, which returns its scorer.
        rounds: number of pairs.
        count: captions per process.
    """
    sides = {"fast": (ROOT, OURS), "former": (former, source)}
    rates: dict[str, dict[str, list[float]]] = {mode: {name: [] for name in sides} for mode in MODES}
    startups: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (folder, function) in sides.items():
            start = time.perf_counter()
            first = _run(folder, function, 0)
            startups[name].append(time.perf_counter() - start)
            found = _run(folder, function, count)
            rates["in_one_call"][name].append(count / found["seconds"])
            rates["one_by_one"][name].append(min(count, SINGLE) / found["singly"])
            rates["with_startup"][name].append(count / (startups[name][-1] + found["seconds"]))
            if name == "fast" and first["torch"]:
                raise AssertionError("the fast scorer imports torch")
    return {
        "captions": count,
        "rounds": rounds,
        "fast.over_former": {
            mode: round(statistics.median(a / b for a, b in zip(*found.values(), strict=True)), 2)
            for mode, found in rates.items()
        },
        "captions_per_second": {
            mode: {name: round(statistics.median(values)) for name, values in found.items()}
            for mode, found in rates.items()
        },
        "startup_seconds": {name: round(min(values), 2) for name, values in startups.items()},
    }


def _run(folder: Path, function: str, count: int) -> dict[str, Any]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    finished = subprocess.run(
        [sys.executable, "-c", _PROGRAM, function, str(RATED_CAPTIONS), str(count), str(SINGLE)],
        env=os.environ | threads | {"PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"{function} in {folder} failed: {finished.stderr.strip()}")
    return json.loads(finished.stdout)


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--former", type=Path, required=True, help="folder with the other version")
    parser.add_argument(
        "--former-scorer",
        default="cat_fast.complexity.embedded_scorer:default_scorer",
        help="MODULE:FUNCTION that returns its scorer",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--captions", type=int, default=10_000, help="captions per process")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    found = measure(args.former.resolve(), args.former_scorer, args.rounds, args.captions)
    print(json.dumps(found, indent=2))
    if args.json:
        write_json(args.json, found | {"machine": describe()})


if __name__ == "__main__":
    main()
