"""Command line of a benchmark: `main` measures a dictionary of cases, prints the results, and writes JSON."""

import argparse
import gc
import json
import os
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.shared import harness, machine
from benchmarks.shared.compact_json import write_compact
from cat_fast import console
from cat_fast.data.files import require_writable
from cat_fast.errors import UserError


def main(
    benchmark: str,
    cases: Mapping[str, Callable[[], harness.Case]],
    arguments: Sequence[str] | None = None,
    *,
    full: harness.Effort = harness.FULL,
    quick_cases: Mapping[str, Callable[[], harness.Case]] | None = None,
    facts: Callable[[], Mapping[str, Any]] = dict,
) -> int:
    """Run a benchmark's command line. Return the exit code: 1 if a result was wrong or failed, 2 for invalid
    usage.

    `full` is the effort without --quick. `quick_cases` are the cases for --quick, if different. `facts`
    computes and prints additional contents of the file. The file is written after each case, so that --keep
    can resume an interrupted run; its `about` lists the cases that it lacks, also after --only.
    """
    parser = argparse.ArgumentParser(description=f"Benchmark of {benchmark}: correctness, then speed.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument(
        "--quick", action="store_true", help="few pairs, without torch.compile: a rough answer quickly"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose key contains TEXT")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the results in FILE, of this machine and commit without uncommitted changes; "
        "measure only missing, wrong or failed ones, or those of --only",
    )
    given = parser.parse_args(arguments)
    if given.quick and quick_cases is not None:
        cases = quick_cases
    chosen = {key: setup for key, setup in cases.items() if given.only in key}
    try:
        if not chosen:
            raise UserError(
                f"--only {given.only}: no case matches; expected part of one of {', '.join(cases)}"
            )
        if given.json is not None:
            require_writable(given.json)
        effort = harness.QUICK if given.quick else full
        kept = _kept(given.json, benchmark, effort) if given.keep else {}
        if not given.only:
            right = {
                key
                for key, found in kept.get("cases", {}).items()
                if found["right"] and not found.get("failures")
            }
            chosen = {key: setup for key, setup in chosen.items() if key not in right}

        found = facts()

        def save(results: Mapping[str, harness.Result], about: Mapping[str, Any]) -> None:
            if given.json is not None:
                measured = harness.as_json({"benchmark": benchmark, **about}, results)
                written = _merged(kept, {**measured, **harness.rounded(found)}, cases)
                write_compact(given.json, written)

        results = run(chosen, effort, save)
    except UserError as error:
        console.print_error(error)
        return 2
    return 0 if all(result.right and not result.failures for result in results.values()) else 1


def run(
    cases: Mapping[str, Callable[[], harness.Case]],
    effort: harness.Effort,
    save: Callable[[Mapping[str, harness.Result], Mapping[str, Any]], None],
) -> dict[str, harness.Result]:
    """Measure and print the cases in turn, and call `save` after each with all results so far.

    A case that raises is recorded as failed, and the others are measured. The second argument of `save`
    describes the machine, versions and effort.
    """
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "effort": vars(effort),
        **machine.describe(),
        "load_before": os.getloadavg()[0],
    }
    results = {}
    for key, setup in cases.items():
        try:
            results[key] = harness.measure(setup(), effort)
        except Exception as error:
            traceback.print_exc()
            results[key] = harness.failed(error)
        gc.collect()  # free the tensors of one case before the next
        for line in harness.lines(key, results[key]):
            print(line, flush=True)
        save(results, about | {"load_after": os.getloadavg()[0]})
    return results


def _kept(path: Path | None, benchmark: str, effort: harness.Effort) -> dict[str, Any]:
    """Return the results of an earlier call of this benchmark with the same machine, versions and effort."""
    if path is None:
        raise UserError("--keep: give the file with --json")
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    now = {"benchmark": benchmark, "effort": vars(effort), **machine.describe()}
    if reason := why_not_resumed(found, now):
        raise UserError(f"--keep: {path} was {reason}; measure again without --keep")
    return found


def why_not_resumed(found: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return why a run that `now` describes cannot add to the results of a file, None if it can."""
    written = json.loads(json.dumps(harness.rounded(now)))
    about = found.get("about", {})
    if differing := [name for name, value in written.items() if about.get(name) != value]:
        return f"measured with another {', '.join(differing)}"
    if machine.is_dirty(now.get("commit")):
        return f"measured with uncommitted changes of {now['commit']}, which may not be the present ones"
    return None


def _merged(kept: Mapping[str, Any], written: dict[str, Any], order: Collection[str]) -> dict[str, Any]:
    """Merge both files in the order of the cases; `about` is that of the newer one, with missing cases."""
    measured = written["cases"]
    cases = kept.get("cases", {}) | measured
    ratios = {
        key: value
        for key, value in kept.items()
        if ".ratio_vs_" in key and key.split(".ratio_vs_")[0] not in measured
    }
    missing = {"missing": left} if (left := [key for key in order if key not in cases]) else {}
    return {
        **ratios,
        **written,
        "cases": {key: cases[key] for key in order if key in cases},
        "about": written["about"] | missing,
    }
