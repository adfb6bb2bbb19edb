"""Captions per second of the fast scorer, against the scorer of another version of this project.

    git archive VERSION cat_fast | tar -x -C FOLDER
    python -m benchmarks.scorers --former FOLDER --json benchmarks/results/scorers.json

Each side runs in processes of its own, one after the other in turn, with one thread. A process scores one
caption, which loads the scorer, and then the packaged rated captions; processor time counts. Start-up is the
time from the start of a process to the end of its first score, without captions to follow.
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
from cat_fast.complexity.distillation.rated_captions import RATED_CAPTIONS
from cat_fast.data.files import write_json

ROOT = Path(__file__).parents[1]

_PROGRAM = """
import json, sys, time
from importlib import import_module
from pathlib import Path
source, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
scorer = getattr(import_module(source.partition(":")[0]), source.partition(":")[2])()
from cat_fast.complexity.description import Description
scorer.score_many([Description("a dog lying on grass", False, False)])
seconds = 0.0
if count:
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.open(encoding="utf-8")]
    rows = [json.loads(line) for line in lines][:count]
    descriptions = [Description(row["caption"], row["has_text"], row["has_faces"]) for row in rows]
    start = time.process_time()
    scorer.score_many(descriptions)
    seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "torch": "torch" in sys.modules}))
"""

OURS = "cat_fast.complexity.scorers.fast.scorer:fast_scorer"


def measure(former: Path, source: str, rounds: int, count: int) -> dict[str, Any]:
    """Return throughputs and start-up times per side, and the median ratio of throughputs over the rounds.

    Args:
        former: folder with the package of the other version.
        source: MODULE:FUNCTION in that version, which returns its scorer.
        rounds: number of pairs.
        count: captions per process.
    """
    sides = {"fast": (ROOT, OURS), "former": (former, source)}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    startups: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (folder, function) in sides.items():
            start = time.perf_counter()
            first = _run(folder, function, 0)
            startups[name].append(time.perf_counter() - start)
            rates[name].append(count / _run(folder, function, count)["seconds"])
            if name == "fast" and first["torch"]:
                raise AssertionError("the fast scorer imports torch")
    ratios = [ours / theirs for ours, theirs in zip(rates["fast"], rates["former"], strict=True)]
    return {
        "fast.over_former": round(statistics.median(ratios), 2),
        "captions": count,
        "rounds": rounds,
        "ratios": [round(ratio, 2) for ratio in ratios],
        "captions_per_second": {name: round(statistics.median(values)) for name, values in rates.items()},
        "startup_seconds": {name: round(min(values), 2) for name, values in startups.items()},
    }


def _run(folder: Path, function: str, count: int) -> dict[str, Any]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    finished = subprocess.run(
        [sys.executable, "-c", _PROGRAM, function, str(RATED_CAPTIONS), str(count)],
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
    parser.add_argument("--captions", type=int, default=4000, help="captions per process")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    found = measure(args.former.resolve(), args.former_scorer, args.rounds, args.captions)
    print(json.dumps(found, indent=2))
    if args.json:
        write_json(args.json, found | {"machine": describe()})


if __name__ == "__main__":
    main()
