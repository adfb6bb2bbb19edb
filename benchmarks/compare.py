"""Compare two folders or files of results, and report regressions beyond the noise.

    python -m benchmarks.compare A B [--noise FILE,FILE ...] [--json FILE]

A is the former and B the newer result. Compared are the times of ours per case. The noise band of a case
comes from A/A rounds, results of the same code and machine as A: those that `--noise` names, or else the
folders A/again_* of `benchmarks.run --again`. The band is the largest deviation of their times from A's.
Without rounds, it is the distance of the quartiles from the median in A and B. A case regresses if B takes
longer than A by more than its band and by more than 2 %. Exit codes: 0 no regression, 1 a regression, 2 for
invalid usage or results that are not comparable.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared.committed import NAME
from cat_fast import console
from cat_fast.data.files import write_json
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command

LEAST = 0.02
"""Relative change below which nothing is reported."""
FASTER, SLOWER, SAME = "faster", "slower", "same"


@dataclass(frozen=True)
class Change:
    """Time of one case in two results."""

    case: str
    before: float
    """Seconds per call."""
    after: float
    band: float
    """Relative change that noise explains."""
    from_rounds: bool
    """True if the band comes from A/A rounds."""

    @property
    def relative(self) -> float:
        """Relative change of the time; positive is slower."""
        return self.after / self.before - 1

    @property
    def verdict(self) -> str:
        """One of FASTER, SLOWER and SAME."""
        limit = max(self.band, LEAST)
        if self.relative > limit:
            return SLOWER
        # the same factor in the other direction
        return FASTER if 1 / (1 + self.relative) - 1 > limit else SAME


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Return the results of a file or folder by benchmark.

    Raises:
        UserError: the path is missing, or a file is not valid JSON or that of a dry run.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    found = {}
    for file in files:
        match = NAME.fullmatch(file.name)
        if path.is_dir() and match is None:
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{file}: it is not valid JSON ({error})") from error
        if content.get("dry"):
            raise UserError(f"{file}: figures of a dry run are not measurements; run the check on a GPU")
        found[content.get("about", {}).get("benchmark") or (match["model"] if match else file.stem)] = content
    if not found:
        raise UserError(f"{path}: expected results named MODEL_MACHINE_DATE.json, found none")
    return found


def compare(
    before: Mapping[str, Any], after: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]] = ()
) -> list[Change]:
    """Return the change of every case that both results have."""
    old, new = timed(before), timed(after)
    changes = []
    for case in old:
        if case in new:
            again = [timed(one)[case]["median"] for one in rounds if case in timed(one)]
            band = noise_band(old[case], new[case], again)
            changes.append(Change(case, old[case]["median"], new[case]["median"], band, bool(again)))
    return changes


def timed(results: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return median and quartiles of the seconds per call of ours, by case; wrong cases have none."""
    cases = results.get("cases", {})
    return {
        key: case["seconds"]["ours"]
        for key, case in cases.items()
        if isinstance(case, Mapping) and "ours" in case.get("seconds", {})
    }


def noise_band(old: Mapping[str, float], new: Mapping[str, float], again: Sequence[float]) -> float:
    """Return the relative change that noise explains."""
    if again:
        return max(max(other / old["median"], old["median"] / other) - 1 for other in again)
    spreads = (max(one["high"] / one["median"], one["median"] / one["low"]) - 1 for one in (old, new))
    return sum(spreads)


def require_comparable(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> None:
    """Raise a UserError if two results were measured on different machines."""
    for key in ("cpu", "gpus"):
        old, new = (content.get("about", {}).get(key) for content in (before, after))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            old, new = ({k: one.get(k) for k in ("processor", "threads")} for one in (old, new))
        if old != new:
            raise UserError(
                f"{name}: measured on different machines ({key} {old} and {new}); compare results of one"
            )


def lines(name: str, changes: Sequence[Change]) -> list[str]:
    """Format the changes of a benchmark, regressions first."""
    order = {SLOWER: 0, FASTER: 1, SAME: 2}
    text = [name]
    for change in sorted(changes, key=lambda change: (order[change.verdict], -change.relative)):
        source = "A/A" if change.from_rounds else "quartiles"
        text.append(
            f"  {change.verdict:<6} {change.relative:+7.1%} (noise {change.band:.1%} by {source})  "
            f"{change.case}: {change.before * 1e3:.4g} to {change.after * 1e3:.4g} ms"
        )
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", type=Path, metavar="A")
    parser.add_argument("after", type=Path, metavar="B")
    parser.add_argument("--noise", default="", metavar="FILES", help="A/A rounds, comma-separated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the changes to FILE")
    given = parser.parse_args(arguments)
    try:
        before, after = load(given.before), load(given.after)
        named = [Path(name) for name in given.noise.split(",") if name]
        rounds = [load(path) for path in named or sorted(given.before.glob("again_*"))]
        shared = [name for name in before if name in after]
        if not shared:
            raise UserError(f"{given.before} and {given.after} have no benchmark in common")
        found = {}
        for name in shared:
            others = [one[name] for one in rounds if name in one]
            for other in (after[name], *others):
                require_comparable(before[name], other, name)
            found[name] = compare(before[name], after[name], others)
    except UserError as error:
        console.print_error(error)
        return 2
    for name, changes in found.items():
        print("\n".join(lines(name, changes)))
    slower = sum(change.verdict == SLOWER for changes in found.values() for change in changes)
    total = sum(map(len, found.values()))
    print(f"{total} cases, {slower} slower beyond the noise")
    if given.json:
        rows = {
            name: [asdict(c) | {"relative": c.relative, "verdict": c.verdict} for c in changes]
            for name, changes in found.items()
        }
        write_json(given.json, rows)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
