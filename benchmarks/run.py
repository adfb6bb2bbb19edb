"""Run a suite of benchmarks, one process each, and write their JSON and logs to one folder.

    python -m benchmarks.run --suite cpu|gpu|quick --out DIR [--only NAME,NAME] [--again N] [--plan]

    quick   rough figures within minutes: kernels and packing with few pairs, stragglers, bounds, claims
    cpu     everything that this machine can measure; hours on two cores
    gpu     what a GPU machine measures, and the bounds of its kernels

Files are named MODEL_MACHINE_DATE.json (`benchmarks/shared/committed.py`) and record the suite's arguments.
Complete results of this machine in DIR are kept if they have the same arguments, or none; delete a file to
measure again. Counted ones are kept at the same commit without local changes only, and claims while they are
newer than all other results. An interrupted benchmark resumes with its missing cases where it can: on the
same machine, at the same commit without local changes.
`run.json` in DIR lists commands, seconds and states, also of earlier calls. --plan runs nothing and prints a
table of minutes: those of DIR where it has results, else estimates; with --only, the suite can then be run in
parts. `python -m benchmarks.report DIR` makes the report.

No suite has the benchmarks that need models or data (evaluation, serving_load, scorers, detectors,
dual_token, nano_*), that train models (attention_readings), or that check a rented GPU within minutes
(gpu_check).

Exit codes: 0 all finished, 1 a benchmark failed or finished with misses, 2 for invalid usage.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import psutil

from benchmarks.shared import machine
from benchmarks.shared.committed import NAME, arguments_of, is_quick, machine_slug, newest, read
from benchmarks.shared.compact_json import write_compact
from benchmarks.shared.program import why_not_resumed
from cat_fast import console
from cat_fast.data.files import write_json
from cat_fast.errors import UserError
from cat_fast.processes.group import running
from cat_fast.processes.signals import run_command

ROOT = Path(__file__).parents[1]
FINISHED, MISSES, FAILED = "finished", "finished with misses", "failed"
INTERRUPTED, MISSING = "interrupted", "missing"
"""States of a benchmark. One with misses has results, but some were wrong or missed their goal."""
COUNTED = "counted"
ROUGH = "--quick"
"""Option of rough results, which count as complete ones in the quick suite only."""
RECORD = "run.json"
KEEP = ("--keep",)
"""Option of `shared.program` that resumes a file."""
END_SECONDS = 10.0
"""Time that an interrupted benchmark has to remove its temporary files."""


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
    resumes_with: tuple[str, ...] | None = None
    """Further arguments to resume its unfinished file, if it writes one after each case; None if it starts
    again."""
    reads_results: bool = False
    """True if it takes the folder of results with --results. It runs last, and again after new results."""

    def slug(self, about: Mapping[str, Any]) -> str:
        """Return the second part of the file's name, from a description of the machine."""
        return COUNTED if self.counted else machine_slug(about)


_COUNTED = (
    Job(name="launches", minutes=1, counted=True),
    Job(name="roofline", minutes=1, counted=True),
    Job(name="scaling", minutes=1, counted=True),
)
_CLAIMS = Job(name="claims", minutes=2, counted=True, reads_results=True)
SUITES: Mapping[str, Sequence[Job]] = {
    "quick": (
        *_COUNTED,
        Job(name="kernels", arguments=(ROUGH,), minutes=1, resumes_with=KEEP),
        Job(name="packing", arguments=(ROUGH,), minutes=1, resumes_with=KEEP),
        Job(name="straggler", arguments=(ROUGH,), minutes=1),
        _CLAIMS,
    ),
    "cpu": (
        *_COUNTED,
        Job(name="kernels", minutes=5, resumes_with=KEEP),
        Job(name="packing", minutes=15, resumes_with=KEEP),
        Job(name="autoencoder", minutes=30, resumes_with=KEEP),
        Job(name="training_steps", minutes=12),
        Job(name="linear", minutes=8),
        Job(name="dispatch", minutes=1),
        Job(name="straggler", minutes=8),
        Job(name="loader", minutes=5, resumes_with=KEEP),
        Job(name="scoring", minutes=3),
        Job(name="startup", minutes=3),
        Job(name="checkpoints", minutes=2),
        Job(name="scaling_validation", minutes=25, resumes_with=()),
        Job(name="serving", minutes=120, resumes_with=()),
        Job(name="gpu_static", minutes=5, counted=True),
        _CLAIMS,
    ),
    "gpu": (
        *_COUNTED,
        Job(name="kernels", minutes=5, resumes_with=KEEP),
        Job(name="packing", minutes=10, resumes_with=KEEP),
        Job(name="autoencoder", minutes=20, resumes_with=KEEP),
        Job(name="training_steps", minutes=5),
        Job(name="straggler", minutes=5),
        Job(name="loader", minutes=5, resumes_with=KEEP),
        Job(name="startup", minutes=3),
        Job(name="checkpoints", minutes=2),
        Job(name="serving", minutes=20, resumes_with=()),
        _CLAIMS,
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
    """Run the jobs that have no results yet, one after another; return and write the states of all.

    Args:
        about: description of the machine.
    """
    states = {state["name"]: state for state in recorded(out)}
    kept = kept_files(jobs, out, about)
    for job in jobs:
        state = states.get(job.name, {})
        if file := kept.get(job.name):
            known = state if state.get("file") == file.name else {}
            states[job.name] = {**asdict(job), "state": FINISHED, **known, **_kept_state(file)}
            print(f"{job.name}: {_why_kept(job, file, about)}", flush=True)
        elif state.get("state") not in (FAILED, INTERRUPTED) or _arguments(state) != job.arguments:
            states[job.name] = {**asdict(job), "state": MISSING}
    waiting = [job for job in jobs if job.name not in kept]
    for number, job in enumerate(waiting):
        left = timedelta(minutes=sum(other.minutes for other in waiting[number:]))
        print(f"{job.name}: about {job.minutes:g} minutes, {left} left in the suite", flush=True)
        resumed = _resumes(job, _part(job, out, about), about)
        spent = states[job.name].get("seconds", 0.0) if resumed else 0.0
        start = time.monotonic()
        try:
            states[job.name] = _run(job, out, about, resumed)
        except KeyboardInterrupt as interrupt:
            states[job.name] = {**asdict(job), "state": INTERRUPTED}
            interrupt.add_note(f"{job.name} was ended; finished results are in {out}; repeat to resume")
            raise
        finally:
            states[job.name]["seconds"] = round(spent + time.monotonic() - start, 1)
            _record(out, about, states)
    _record(out, about, states)
    return [states[job.name] for job in jobs]


def _record(out: Path, about: Mapping[str, Any], states: Mapping[str, Mapping[str, Any]]) -> None:
    write_json(out / RECORD, {"machine": dict(about), "jobs": list(states.values())})


def recorded(out: Path) -> list[dict[str, Any]]:
    """Return the states of earlier calls for a folder, which may be new.

    The record is run.json, or the newest run_MACHINE_DATE.json among committed results.

    Raises:
        UserError: it cannot be read.
    """
    path = out / RECORD
    path = path if path.exists() else newest(out.glob("run_*.json")).get("run", path)
    if not path.exists():
        return []
    content = read(path)
    try:
        return [{"name": job["name"], "state": job["state"], **job} for job in content["jobs"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a record of benchmarks ({error}); delete it") from error


def plan(jobs: Sequence[Job], out: Path, about: Mapping[str, Any]) -> list[str]:
    """Return a table of the minutes of each job and of those that are left, one line per job."""
    states = {state["name"]: state for state in recorded(out)}
    kept = kept_files(jobs, out, about)
    lines, left = [f"{'benchmark':<18}{'minutes':>8}  source    state"], 0.0
    for job in jobs:
        existing, state = kept.get(job.name), states.get(job.name, {})
        measured = state.get("seconds") if existing and state.get("file") == existing.name else None
        minutes = job.minutes if measured is None else measured / 60
        left += 0 if existing else minutes
        source = "estimate" if measured is None else "measured"
        lines.append(f"{job.name:<18}{minutes:>8.1f}  {source}  {existing.name if existing else 'missing'}")
    return [*lines, f"{'left':<18}{left:>8.1f}"]


def kept_files(jobs: Sequence[Job], out: Path, about: Mapping[str, Any]) -> dict[str, Path]:
    """Return the results in a folder of the jobs that need not run, by name."""
    found = {job.name: path for job in jobs if (path := _existing(job, out, about))}
    complete = all(job.name in found for job in jobs if not job.reads_results)
    stale = {
        job.name
        for job in jobs
        if job.reads_results and not (complete and job.name in found and _is_newest(found[job.name]))
    }
    return {name: path for name, path in found.items() if name not in stale}


def _existing(job: Job, out: Path, about: Mapping[str, Any]) -> Path | None:
    """Return the newest results that a job need not measure again."""
    for path in sorted(out.glob(f"{job.name}_{job.slug(about)}_*.json"), reverse=True):
        match = NAME.fullmatch(path.name)
        if match and match["model"] == job.name and _suffices(job, read(path), about):
            return path
    return None


def _suffices(job: Job, content: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    """Return True for complete results with the job's arguments or with none; counted ones of this commit."""
    rough = is_quick(content) and ROUGH not in job.arguments
    if rough or (content.get("about") or {}).get("missing"):
        return False
    if job.counted and why_not_resumed(content, {"commit": about.get("commit")}):
        return False
    return arguments_of(content) in ((), job.arguments)


def _is_newest(path: Path) -> bool:
    """Return True if no other result of the folder was written after a file."""
    others = [other for name, other in newest(path.parent.glob("*.json")).items() if name != "run"]
    return all(other.stat().st_mtime_ns <= path.stat().st_mtime_ns for other in others)


def _kept_state(path: Path) -> dict[str, Any]:
    """Return what the file of a kept result records about its run; files of older runs have no exit code."""
    content = read(path)
    code = content.get("about", {}).get("exit_code")
    state = {} if code is None else {"state": MISSES if code else FINISHED, "exit_code": code}
    return {**state, "arguments": arguments_of(content), "file": path.name, "kept": True}


def _arguments(state: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(state.get("arguments", ()))


def _why_kept(job: Job, path: Path, about: Mapping[str, Any]) -> str:
    reason = None if job.counted else why_not_resumed(read(path), about)
    return f"kept: {path.name}{f', {reason}' if reason else ''}; delete it to measure again"


def _part(job: Job, out: Path, about: Mapping[str, Any]) -> Path:
    """Return the path of unfinished results: without the date, so that they survive midnight."""
    return out / f"{job.name}_{job.slug(about)}{''.join(job.arguments)}.part"


def _resumes(job: Job, part: Path, about: Mapping[str, Any]) -> bool:
    """Return True if a job resumes its unfinished results; delete those that it cannot resume."""
    if not part.exists():
        return False
    if job.resumes_with is not None:
        reason = why_not_resumed(read(part), about)
        if reason is None:
            return True
        print(f"{job.name}: unfinished results are discarded: {reason}", flush=True)
    part.unlink()
    return False


def _run(job: Job, out: Path, about: Mapping[str, Any], resumed: bool) -> dict[str, Any]:
    """Run one benchmark; its file gets its name only if it is complete."""
    path = out / f"{job.name}_{job.slug(about)}_{date.today().isoformat()}.json"
    part = _part(job, out, about)
    log = out / f"{job.name}.log"
    results = ["--results", str(out)] if job.reads_results else []
    arguments = [*job.arguments, *results, *(job.resumes_with or () if resumed else ())]
    command = [sys.executable, "-m", f"benchmarks.{job.name}", "--json", str(part), *arguments]
    code = _execute(command, log)
    state = FAILED
    if code in (0, 1) and part.exists():
        content = read(part)
        described = content.get("about", {})
        if not described.get("missing"):
            state = MISSES if code else FINISHED
            ran = {"arguments": job.arguments, "exit_code": code}
            described = {"commit": about.get("commit"), **described, **ran}
            write_compact(part, {**content, "about": described})
            part.rename(path)
    if state != FINISHED:
        print(f"{job.name}: {state}, exit code {code}; see {log}", flush=True)
    shown = ["python", *command[1:4], path.name, *job.arguments, *(["--results", "."] if results else [])]
    found = {"state": state, "exit_code": code, "command": " ".join(shown)}
    return {**asdict(job), **found, "file": None if state == FAILED else path.name}


def _execute(command: Sequence[str], log: Path) -> int:
    """Run a command in a process group of its own; return its exit code."""
    with (
        log.open("w", encoding="utf-8") as output,
        running(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT) as guard,
    ):
        try:
            return guard.wait()
        except KeyboardInterrupt:
            with suppress(psutil.Error):
                children = psutil.Process(guard.pid).children()
                for child in children:
                    child.terminate()
                psutil.wait_procs(children, timeout=END_SECONDS)
            raise


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
        about = machine.describe()
        if given.plan:
            print("\n".join(plan(jobs, given.out, about)))
            return 0
        try:
            given.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {given.out}: {error.strerror}") from error
        states = run_suite(jobs, given.out, about)
        for number in range(1, given.again + 1):
            folder = given.out / f"again_{number}"
            folder.mkdir(exist_ok=True)
            states += run_suite([job for job in jobs if not job.counted], folder, about)
    except UserError as error:
        console.print_error(error)
        return 2
    counts = Counter(state["state"] for state in states)
    kept = sum(state.get("kept", False) for state in states)
    print(json.dumps({**{kind: counts[kind] for kind in (FINISHED, MISSES, FAILED)}, "kept": kept}))
    return 1 if counts[MISSES] or counts[FAILED] else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
