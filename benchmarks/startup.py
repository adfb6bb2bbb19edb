"""Start-up times: from the start of a process to its end, for commands that users wait for.

    python -m benchmarks.startup --json FILE [--quick]

Commands run in turn, several rounds; the figure is the median of the wall-clock time. The first round, which
reads files from the disk, does not count.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.shared import simple_program
from cat_fast.processes.signals import run_command

CAT_FAST = ("-c", "from cat_fast.cli.main import main; main()")
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "python": ("-c", "pass"),
    "import cat_fast": ("-c", "import cat_fast"),
    "import torch": ("-c", "import torch"),
    "cat-fast --help": (*CAT_FAST, "--help"),
    "cat-fast info": (*CAT_FAST, "info"),
    "cat-fast score --scorer fast": (*CAT_FAST, "score", "--caption", "a dog", "--scorer", "fast"),
    "cat-fast score --scorer accurate": (*CAT_FAST, "score", "--caption", "a dog", "--scorer", "accurate"),
}
ROUNDS = 5


def seconds_of(command: Sequence[str]) -> float:
    """Return the seconds of one process.

    Raises:
        RuntimeError: it failed.
    """
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    taken = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return taken


def measure(quick: bool, run: Callable[[Sequence[str]], float] = seconds_of) -> dict[str, Any]:
    """Return the median seconds of every command, and the range over the rounds."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(1 + (1 if quick else ROUNDS)):
        for name, command in COMMANDS.items():
            seconds = run(command)
            if number:
                taken[name].append(seconds)
    return {
        "seconds": {
            name: {"median": statistics.median(values), "low": min(values), "high": max(values)}
            for name, values in taken.items()
        }
    }


def lines(found: Mapping[str, Any]) -> Sequence[str]:
    """Format the results, one command per line."""
    return [
        f"{name}: {row['median']:.2f} s ({row['low']:.2f} to {row['high']:.2f})"
        for name, row in found["seconds"].items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return simple_program.main("startup", __doc__ or "", measure, lines, arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
