"""Run a suite of benchmarks, one process each, and write their JSON and logs to one folder.

    python -m benchmarks.run --suite cpu|gpu|quick --out DIR [--only NAME,NAME] [--again N] [--plan]

    quick   rough figures within minutes: kernels and packing with few pairs, stragglers, bounds, claims
    cpu     everything that this machine can measure; hours on two cores
    gpu     what a GPU machine measures, and the bounds of its kernels

Files are named MODEL_MACHINE_DATE.json (`benchmarks/shared/committed.py`). A benchmark that has results of
this machine in DIR is skipped, so that an interrupted suite resumes; delete the file to measure again.
`run.json` in DIR lists commands, seconds and states, also of earlier calls. --plan runs nothing and prints a
table of minutes: those of DIR where it has results, else estimates; with --only, the suite can then be run in
parts. `python -m benchmarks.report DIR` makes the report.

Exit codes: 0 all finished, 1 a benchmark failed, 2 for invalid usage.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from benchmarks.shared import machine
from benchmarks.shared.committed import NAME, machine_slug
from cat_fast import console
from cat_fast.data.files import write_json
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command

ROOT = Path(__file__).parents[1]
FINISHED, FAILED, SKIPPED = "finished", "failed", "skipped"
COUNTED = "counted"
RECORD = "run.json"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One benchmark of a suite."""

    name: str
    """Module in benchmarks/, and the first part of the file's name."""
    arguments: tuple[str, ...] = ()
    minutes: float
    """Approximate duration on two cores, for the time left."""
    counted: bool = False
    """True if its figures do not depend on the machine; its file is then named after none."""

    def slug(self, about: Mapping[str, Any]) -> str:
        """Return the second part of the file's name, from a description of the machine."""
        return COUNTED if self.counted else machine_slug(about)


_COUNTED = (
    Job(name="claims", minutes=2, counted=True),
    Job(name="launches", minutes=1, counted=True),
    Job(name="roofline", minutes=1, counted=True),
    Job(name="scaling", minutes=1, counted=True),
)
SUITES: Mapping[str, Sequence[Job]] = {
    "quick": (
        Job(name="kernels", arguments=("--quick",), minutes=1),
        Job(name="packing", arguments=("--quick",), minutes=1),
        Job(name="straggler", arguments=("--quick",), minutes=1),
        *_COUNTED,
    ),
    "cpu": (
        *_COUNTED,
        Job(name="kernels", minutes=10),
        Job(name="packing", minutes=30),
        Job(name="autoencoder", minutes=60),
        Job(name="training_steps", minutes=10),
        Job(name="linear", minutes=5),
        Job(name="dispatch", minutes=1),
        Job(name="straggler", minutes=5),
        Job(name="loader", minutes=5),
        Job(name="scoring", minutes=3),
        Job(name="startup", minutes=3),
        Job(name="checkpoints", minutes=2),
        Job(name="serving", minutes=120),
        Job(name="gpu_static", minutes=5),
    ),
    "gpu": (
        *_COUNTED,
        Job(name="kernels", minutes=5),
        Job(name="packing", minutes=10),
        Job(name="autoencoder", minutes=20),
        Job(name="training_steps", minutes=5),
        Job(name="straggler", minutes=5),
        Job(name="loader", minutes=5),
        Job(name="serving", minutes=20),
    ),
}


def chosen(suite: str, only: str) -> list[Job]:
    """Return the jobs of a suite, or those of any suite that `only` names.

    Raises:
        UserError: a name is not that of a job.
    """
    if not only:
        return list(SUITES[suite])
    own = {job.name: job for job in SUITES[suite]}
    known = {job.name: job for jobs in SUITES.values() for job in jobs} | own
    names = only.split(",")
    if missing := [name for name in names if name not in known]:
        raise UserError(f"--only {missing[0]}: expected some of {', '.join(sorted(known))}")
    return [known[name] for name in names]


def run_suite(jobs: Sequence[Job], out: Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Run the jobs one after another; return and write their states.

    Args:
        about: description of the machine.
    """
    states: list[dict[str, Any]] = []
    earlier = {state["name"]: state for state in recorded(out)}
    for number, job in enumerate(jobs):
        left = timedelta(minutes=sum(other.minutes for other in jobs[number:]))
        if (existing := _existing(job, out, about)) is not None:
            print(f"{job.name}: skipped, {existing.name} exists", flush=True)
            before = earlier.get(job.name, {})
            states.append({**before, **asdict(job), "state": SKIPPED, "file": existing.name})
            continue
        path = out / f"{job.name}_{job.slug(about)}_{date.today().isoformat()}.json"
        print(f"{job.name}: about {job.minutes:g} minutes, {left} left in the suite", flush=True)
        states.append(_run(job, path, out / f"{job.name}.log"))
        _record(out, about, earlier, states)
    _record(out, about, earlier, states)
    return states


def recorded(out: Path) -> list[dict[str, Any]]:
    """Return the states of earlier calls for a folder, which may be new.

    Raises:
        UserError: its run.json cannot be read.
    """
    path = out / RECORD
    try:
        return json.loads(path.read_text(encoding="utf-8"))["jobs"] if path.exists() else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a record of benchmarks ({error}); delete it") from error


def plan(jobs: Sequence[Job], out: Path, about: Mapping[str, Any]) -> list[str]:
    """Return a table of the minutes of each job and of those that are left, one line per job."""
    seconds = {state["name"]: state.get("seconds") for state in recorded(out)}
    lines, left = [f"{'benchmark':<18}{'minutes':>8}  source    state"], 0.0
    for job in jobs:
        existing = _existing(job, out, about)
        measured = seconds.get(job.name) if existing else None
        minutes = job.minutes if measured is None else measured / 60
        left += 0 if existing else minutes
        source = "estimate" if measured is None else "measured"
        lines.append(f"{job.name:<18}{minutes:>8.1f}  {source}  {existing.name if existing else 'missing'}")
    return [*lines, f"{'left':<18}{left:>8.1f}"]


def _record(
    out: Path,
    about: Mapping[str, Any],
    earlier: Mapping[str, Mapping[str, Any]],
    states: Sequence[Mapping[str, Any]],
) -> None:
    jobs = {**earlier, **{state["name"]: state for state in states}}
    write_json(out / RECORD, {"machine": dict(about), "jobs": list(jobs.values())})


def _existing(job: Job, out: Path, about: Mapping[str, Any]) -> Path | None:
    for path in sorted(out.glob(f"{job.name}_{job.slug(about)}_*.json")):
        match = NAME.fullmatch(path.name)
        if match and match["model"] == job.name:
            return path
    return None


def _run(job: Job, path: Path, log: Path) -> dict[str, Any]:
    """Run one benchmark; its file gets its name only if it finished."""
    part = path.with_suffix(".part")
    command = [sys.executable, "-m", f"benchmarks.{job.name}", "--json", str(part), *job.arguments]
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    seconds = round(time.monotonic() - start, 1)
    state = FINISHED if code == 0 and part.exists() else FAILED
    if state == FINISHED:
        part.rename(path)
    else:
        print(f"{job.name}: failed with exit code {code}; see {log}", flush=True)
    shown = ["python", *command[1:4], path.name, *job.arguments]
    found = {"state": state, "seconds": seconds, "exit_code": code, "command": " ".join(shown)}
    return {**asdict(job), **found, "file": path.name if state == FINISHED else None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="cpu")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of results and logs")
    parser.add_argument("--only", default="", metavar="NAMES", help="comma-separated benchmarks to run")
    parser.add_argument(
        "--again",
        type=int,
        default=0,
        metavar="N",
        help="repeat the timed benchmarks N times in DIR/again_1 ..., for the noise band of compare",
    )
    parser.add_argument("--plan", action="store_true", help="print the minutes of each benchmark only")
    given = parser.parse_args(arguments)
    try:
        jobs = chosen(given.suite, given.only)
        if given.plan:
            print("\n".join(plan(jobs, given.out, machine.describe())))
            return 0
        try:
            given.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {given.out}: {error.strerror}") from error
        about = machine.describe()
        states = run_suite(jobs, given.out, about)
        for number in range(1, given.again + 1):
            folder = given.out / f"again_{number}"
            folder.mkdir(exist_ok=True)
            states += run_suite([job for job in jobs if not job.counted], folder, about)
    except UserError as error:
        console.print_error(error)
        return 2
    counts = [sum(state["state"] == kind for state in states) for kind in (FINISHED, SKIPPED, FAILED)]
    print(json.dumps(dict(zip((FINISHED, SKIPPED, FAILED), counts, strict=True))))
    return 1 if counts[2] else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
