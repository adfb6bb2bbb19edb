"""Start-up time, throughput and peak memory of a scorer, measured in processes of their own on one core."""

import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

from cat_fast.errors import UserError

CAPTIONS = 4000
"""Captions scored to measure the throughput."""

_PROGRAM = """
import json, sys, time
from cat_fast.complexity.rated_captions import read_rated
from cat_fast.complexity.score import require_scores
from cat_fast.complexity.scorers.loading import load_scorer
from cat_fast.complexity.description import Description
scorer = load_scorer(sys.argv[1])
count = int(sys.argv[2])
require_scores(scorer, [Description("a dog lying on grass")])
seconds = 0.0
if count:
    descriptions = [row.description for row in read_rated()[:count]]
    wall, cpu = time.perf_counter(), time.process_time()
    require_scores(scorer, descriptions)
    seconds = time.process_time() - cpu
status = open("/proc/self/status", encoding="ascii").read()  # a child's ru_maxrss starts at its parent's
peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
print(json.dumps({"seconds": seconds, "memory": int(peak)}))
"""


def measure_footprint(name: str) -> dict[str, Any]:
    """Return the footprint of the packaged scorer `name`.

    Start-up is the time of a process that scores one caption. Processor times are given next to it, which
    other processes on the machine affect less.

    Raises:
        UserError: the scorer cannot be loaded.
    """
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    first = _run(name, 0)
    elapsed = time.perf_counter() - wall
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    many = _run(name, CAPTIONS)
    return {
        "startup_seconds": elapsed,
        "startup_processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "captions_per_processor_second": CAPTIONS / many["seconds"],
        "peak_memory_mb": max(first["memory"], many["memory"]) / 1024,
    }


def _run(name: str, captions: int) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", _PROGRAM, name, str(captions)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise UserError(f"the {name} scorer cannot be measured: {finished.stderr.strip().splitlines()[-1]}")
    return json.loads(finished.stdout)
