"""Compare two folders or files of results, and report regressions beyond the noise.

    python -m benchmarks.compare A B [--noise DIR,DIR ...] [--json FILE]

A is the former and B the newer result; of folders, the newest result of each benchmark. `FIGURES` lists what
is compared: times, ratios to baselines, rates, waits. The noise band of a figure is the larger of two: the
distance of the quartiles from the median in A and B, and the largest deviation from A of A/A rounds, results
of the same code and machine as A. `--noise` names the rounds, else they are A/again_* of `benchmarks.run
--again`. A figure without quartiles has a band of 5 % at least. A figure regresses if B is worse than A by
more than its band and by more than 2 %.

Figures of A that are wrong or missing in B, and benchmarks that failed in B, count as regressions. Results of
other machines, arguments or efforts, rounds of another commit than A, and cases of other details are not
compared, and are listed.

Exit codes: 0 no regression, 1 a regression, 2 for invalid usage or if nothing could be compared.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.run import FAILED, recorded
from benchmarks.shared.committed import NAME, arguments_of, newest, read
from cat_fast import console
from cat_fast.data.files import write_json
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command

LEAST = 0.02
"""Relative change below which nothing is reported."""
WITHOUT_QUARTILES = 0.05
"""Least band of figures that were measured once."""
BETTER, WORSE, SAME = "better", "worse", "same"
LOWER, HIGHER, LOWER_SHARE = "lower", "higher", "lower share"
"""The better direction of a figure. Of a share, the rest up to 1 is compared: small shares are noisy."""

Keys = tuple[str, ...]
"""Keys from the top of a file to a figure."""
TIMED: Mapping[Keys, str] = {
    ("cases", "*", "seconds", "ours"): LOWER,
    ("cases", "*", "ratios", "*"): HIGHER,
}
SERVED: Mapping[Keys, str] = {
    ("mixes", "*", "*", "median", "engine", name): direction
    for name, direction in (
        ("images_per_second", HIGHER),
        ("within_three_times_alone", HIGHER),
        ("p50", LOWER),
        ("p95", LOWER),
        ("p99", LOWER),
    )
}
FIGURES: Mapping[str, Mapping[Keys, str]] = {
    "kernels": TIMED,
    "packing": TIMED,
    "autoencoder": TIMED,
    "loader": TIMED,
    "training_steps": TIMED,
    "gpu_check": TIMED,
    "linear": {
        ("cases", "*", "step_seconds", "mkl"): LOWER,
        ("cases", "*", "step_seconds", "onednn"): LOWER,
        ("cases", "*", "mkl_over_onednn"): HIGHER,
    },
    "dispatch": {
        ("cases", "*", "processor_microseconds", "ours"): LOWER,
        ("cases", "*", "usual_over_ours"): HIGHER,
    },
    "startup": {("seconds", "*"): LOWER},
    "checkpoints": {("checkpoints", "*", "save_seconds"): LOWER, ("checkpoints", "*", "load_seconds"): LOWER},
    "scoring": {("scorers", "*", "seconds"): LOWER},
    "straggler": {("cases", "*", "wait"): LOWER_SHARE},
    "serving": SERVED,
    "serving_simulation": SERVED,
}
"""Figures of each benchmark: paths in its file, `*` for any key, and the better direction. Counted benchmarks
have none; `benchmarks.quick` compares counts."""
LIMITS = ("max_pairs", "seconds", "longest_extra_run", "longest_repeated_turn")
"""Entries of an effort that change the number of pairs and not the meaning of the figures; older results lack
some."""
DETAILS = ("images", "tokens", "precision")
"""Entries of a case that describe its work, next to its details."""


@dataclass(frozen=True)
class Figure:
    """One figure of a result."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Relative distance of the quartiles from the median."""
        if self.low == self.high:
            return WITHOUT_QUARTILES / 2
        return max(_apart(self.high, self.median), _apart(self.median, self.low))

    @property
    def rest(self) -> "Figure":
        """The rest of a share, up to 1."""
        return Figure(1 - self.median, 1 - self.high, 1 - self.low)


@dataclass(frozen=True)
class Change:
    """One figure in two results."""

    case: str
    before: float
    after: float
    band: float
    """Relative change that noise explains."""
    from_rounds: bool
    """True if the band comes from A/A rounds."""
    direction: str = LOWER

    @property
    def relative(self) -> float:
        """Relative change of the figure."""
        return _apart(self.after, self.before)

    @property
    def verdict(self) -> str:
        """One of BETTER, WORSE and SAME."""
        limit = max(self.band, LEAST)
        rise, fall = self.relative, _apart(self.before, self.after)
        loss, gain = (rise, fall) if self.direction == LOWER else (fall, rise)
        return WORSE if loss > limit else BETTER if gain > limit else SAME


@dataclass
class Comparison:
    """Findings on one benchmark."""

    changes: list[Change] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """What is wrong, missing or failed in B."""
    not_compared: list[str] = field(default_factory=list)
    """Cases or results, with the reason."""

    @property
    def regressions(self) -> int:
        """Number of failures and of figures that are worse."""
        return len(self.failures) + sum(change.verdict == WORSE for change in self.changes)


@dataclass(frozen=True)
class Source:
    """Results of a file or folder by benchmark, and the states of its run."""

    results: Mapping[str, Mapping[str, Any]]
    jobs: Mapping[str, Mapping[str, Any]]


def load(path: Path) -> Source:
    """Read the results of a file or folder.

    Raises:
        UserError: the path is missing, a file is invalid, or there are no results.
    """
    if path.is_dir():
        files = newest(path.glob("*.json"))
        jobs = {job["name"]: job for job in recorded(path)}
    else:
        match = NAME.fullmatch(path.name)
        files, jobs = {match["model"] if match else path.stem: path}, {}
    if not files and not jobs:
        raise UserError(f"{path}: expected results named MODEL_MACHINE_DATE.json, found none")
    return Source({name: read(file) for name, file in files.items() if name != "run"}, jobs)


def compare(
    name: str, before: Mapping[str, Any], after: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]] = ()
) -> Comparison:
    """Compare all figures of two results of a benchmark."""
    found = Comparison()
    wrong = {key for key, case in _cases(after).items() if not case.get("right", True)}
    found.failures += [f"{key}: wrong or failed in B" for key in sorted(wrong)]
    other = {
        key for key in _cases(before) if key in _cases(after) and _work(before, key) != _work(after, key)
    }
    found.not_compared += [
        f"{key}: other work in B: {_difference(before, after, key)}" for key in sorted(other)
    ]
    old, new = figures(name, before), figures(name, after)
    again = [figures(name, one) for one in rounds]
    for keys, (figure, direction) in old.items():
        shown = " ".join(keys[1:])
        if keys[1] in wrong or keys[1] in other:
            continue
        if keys not in new:
            found.failures.append(f"{shown}: missing in B")
            continue
        others = [one[keys][0].median for one in again if keys in one]
        band, from_rounds = noise_band(figure, new[keys][0], others)
        found.changes.append(Change(shown, figure.median, new[keys][0].median, band, from_rounds, direction))
    found.not_compared += [f"{' '.join(keys[1:])}: missing in A" for keys in new if keys not in old]
    return found


def figures(name: str, content: Mapping[str, Any]) -> dict[Keys, tuple[Figure, str]]:
    """Return the figures of a result with their better direction, by their keys; wrong cases have none."""
    found: dict[Keys, tuple[Figure, str]] = {}
    for pattern, direction in FIGURES[name].items():
        for keys, value in _walk(content, pattern):
            if isinstance(value, Mapping):
                figure = Figure(value["median"], value["low"], value["high"])
            elif value is not None:
                figure = Figure(value, value, value)
            else:
                continue
            if direction == LOWER_SHARE:
                found[(*keys[:-1], f"1 - {keys[-1]}")] = figure.rest, HIGHER
            else:
                found[keys] = figure, direction
    return found


def _walk(content: Any, pattern: Keys) -> Iterator[tuple[Keys, Any]]:
    """Yield keys and values that match a pattern."""
    if not pattern:
        yield (), content
    elif isinstance(content, Mapping):
        for key in content if pattern[0] == "*" else content.keys() & {pattern[0]}:
            for rest, value in _walk(content[key], pattern[1:]):
                yield (key, *rest), value


def _cases(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    cases = content.get("cases", {})
    return {key: case for key, case in cases.items() if isinstance(case, Mapping)}


def _work(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the description of a case's work."""
    case = _cases(content)[key]
    return case.get("details", {}) | {name: case[name] for name in DETAILS if name in case}


def _difference(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    old, new = _work(before, key), _work(after, key)
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)} and {new.get(name)}" for name in differing)


def noise_band(old: Figure, new: Figure, again: Sequence[float]) -> tuple[float, bool]:
    """Return the relative change that noise explains, and True if A/A rounds give it."""
    quartiles = old.spread + new.spread
    rounds = max((max(_apart(one, old.median), _apart(old.median, one)) for one in again), default=0.0)
    return max(quartiles, rounds), rounds > quartiles


def _apart(one: float, other: float) -> float:
    """Return how much larger one figure is than another, relative to the other."""
    return one / other - 1 if other else float("inf") if one else 0.0


def why_not_comparable(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Return why two results cannot be compared, None if they can."""
    for key in ("cpu", "gpus"):
        old, new = (content.get("about", {}).get(key) for content in (before, after))
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            old, new = ({k: one.get(k) for k in ("processor", "threads")} for one in (old, new))
        if old != new:
            return f"measured on different machines ({key} {old} and {new})"
    old, new = (list(arguments_of(content)) for content in (before, after))
    if old != new:
        return f"measured with different arguments ({old} and {new})"
    old, new = (_effort(content) for content in (before, after))
    return None if old == new else f"measured with different efforts ({old} and {new})"


def _effort(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what changes the meaning of the figures."""
    about = content.get("about", {})
    effort = content.get("effort") or about.get("effort") or {}
    kept = {key: value for key, value in effort.items() if key not in LIMITS}
    return {"without": [], **kept, "quick": about.get("quick", False)}


def compare_all(before: Source, after: Source, rounds: Sequence[Source]) -> dict[str, Comparison]:
    """Compare every benchmark of two sources."""
    found = {}
    for name in sorted({*before.results, *after.results, *after.jobs}):
        found[name] = comparison = Comparison()
        if after.jobs.get(name, {}).get("state") == FAILED:
            comparison.failures.append("failed in B")
        elif name not in FIGURES:
            comparison.not_compared.append("it has no figures to compare")
        elif name not in before.results:
            comparison.not_compared.append("A has no result")
        elif name not in after.results:
            if name in after.jobs:
                comparison.failures.append(f"{after.jobs[name]['state']} in B")
            else:
                comparison.not_compared.append("B has no result")
        else:
            old, new = before.results[name], after.results[name]
            if reason := why_not_comparable(old, new):
                comparison.not_compared.append(reason)
                continue
            others = [one.results[name] for one in rounds if name in one.results]
            comparable = [one for one in others if not why_not_comparable(old, one)]
            same = [one for one in comparable if _commit(one) == _commit(old)]
            found[name] = compare(name, old, new, same)
            found[name].not_compared += ["a round of another commit"] * (len(comparable) - len(same))
    return found


def _commit(content: Mapping[str, Any]) -> str | None:
    commit: str | None = content.get("about", {}).get("commit")
    return commit


def lines(name: str, found: Comparison) -> list[str]:
    """Format the findings on a benchmark, regressions first."""
    order = {WORSE: 0, BETTER: 1, SAME: 2}
    text = [name, *(f"  FAILED  {why}" for why in found.failures)]
    for change in sorted(found.changes, key=lambda change: (order[change.verdict], -abs(change.relative))):
        source = "A/A" if change.from_rounds else "quartiles"
        text.append(
            f"  {change.verdict:<7} {change.relative:+7.1%} (noise {change.band:.1%} by {source})  "
            f"{change.case}: {change.before:.4g} to {change.after:.4g}, {change.direction} is better"
        )
    return text + [f"  not compared: {why}" for why in found.not_compared]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", type=Path, metavar="A")
    parser.add_argument("after", type=Path, metavar="B")
    parser.add_argument("--noise", default="", metavar="PATHS", help="A/A rounds, comma-separated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the changes to FILE")
    given = parser.parse_args(arguments)
    try:
        before, after = load(given.before), load(given.after)
        named = [Path(name) for name in given.noise.split(",") if name]
        again = [path for path in sorted(given.before.glob("again_*")) if newest(path.glob("*.json"))]
        found = compare_all(before, after, [load(path) for path in named or again])
    except UserError as error:
        console.print_error(error)
        return 2
    for name, comparison in found.items():
        print("\n".join(lines(name, comparison)))
    total = sum(len(comparison.changes) for comparison in found.values())
    regressions = sum(comparison.regressions for comparison in found.values())
    print(f"{total} figures compared, {regressions} regressions")
    if given.json:
        write_json(given.json, {name: as_json(comparison) for name, comparison in found.items()})
    if regressions:
        return 1
    if not total:
        console.print_error(UserError(f"{given.before} and {given.after} have no figures to compare"))
        return 2
    return 0


def as_json(found: Comparison) -> dict[str, Any]:
    """Return the findings on a benchmark as JSON values."""
    changes = [asdict(one) | {"relative": one.relative, "verdict": one.verdict} for one in found.changes]
    return asdict(found) | {"changes": changes}


if __name__ == "__main__":
    sys.exit(run_command(main))
