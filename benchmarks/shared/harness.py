"""Fair comparisons of speed: every contestant must first be correct; then they alternate.

A benchmark is a script with a dictionary from key to a function that sets up a `Case`, passed to
`program.main`. It prints each comparison and writes all of them as JSON:

    "<key>.ratio_vs_<baseline>"   speed-up of ours over the baseline: the median over the pairs
    "cases"                       under each key: errors, seconds per call, ratios, pairs, peak memory, work
    "about"                       machine, versions, effort, load of the machine before and after

A case with a wrong result has no ratio. A baseline that raises is left out and named under "failures", as is
a case of which ours raises. The program then exits with 1.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from benchmarks.shared import machine
from cat_fast import hardware

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One implementation of the work of a case."""

    run: Callable[[], Any]
    """Does the work once; timed."""
    outputs: Callable[[Any], Sequence[torch.Tensor]]
    """Converts the result of `run` to tensors with the layout of the truth; not timed."""
    truth: Callable[[], Sequence[torch.Tensor]] | None = None
    """Expected outputs, if its work differs from the case's."""
    rehearsal: Callable[[], Any] | None = None
    """The same work at the size of the truth, if checking `run` would take too long."""
    count: float = 1.0
    """Number of items per run, such as images: ratios compare items per second."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison: the same work by our implementation and by baselines."""

    ours: Contestant
    baselines: Mapping[str, Contestant]
    truth: Callable[[], Sequence[torch.Tensor]]
    """Expected outputs, in a wider dtype."""
    tolerance: float
    """Largest max|output - truth| / max|truth| of any tensor that counts as correct."""
    slack: float = 10.0
    """Baselines may have this many times the tolerance: they must do the same work, but not as accurately.
    (Channels-last GroupNorm of torch 2.14 has an error of 2e-5, ours of 5e-7.)"""
    bytes_moved: int | None = None
    """Bytes that ours reads and writes, if bound by memory."""
    copied: torch.Tensor | None = None
    """Tensor whose copy gives the reference bandwidth for `bytes_moved`."""
    flops: int | None = None
    """Floating-point operations of the work, if bound by arithmetic."""
    multiplied: torch.dtype | None = None
    """Dtype of the matrix product whose rate is the reference for `flops`."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Items per run of ours, such as tokens, to report per second."""
    expected: Mapping[str, float] = field(default_factory=dict)
    """Ratio that the amount of work predicts, by baseline."""
    breakdown: Callable[[], Mapping[str, Any]] | None = None
    """Returns the time and memory of ours by kind of work; called once, after timing."""
    single_process: bool = True
    """False if processes do the work, whose memory cannot be measured from outside."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """More entries for the JSON, such as backend and dtype."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Duration of each comparison: `seconds`, within these numbers of pairs."""

    min_pairs: int
    max_pairs: int
    seconds: float
    longest_extra_run: float = 10.0
    """Baselines slower than this, in seconds, run in timed turns only: their peak memory is not measured."""
    longest_repeated_turn: float = math.inf
    """A comparison ends with the first pair that has a turn longer than this, in seconds."""
    without: tuple[str, ...] = ()
    """Suffixes of the names of baselines to skip."""


FULL = Effort(min_pairs=7, max_pairs=31, seconds=5.0)
QUICK = Effort(min_pairs=1, max_pairs=9, seconds=0.3, longest_extra_run=0.4, without=("compile",))
"""Without torch.compile, which takes half a minute to compile."""
TURN_SECONDS = 0.005
"""Shorter work is repeated until a turn takes about this long."""
RATE_SIDES = (128, 256, 512, 1024, 2048, 4096)
RATE_SECONDS = 0.2
"""Sizes of the matrix products that `matmul_rate` times, and the longest time per size."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Compute linearly interpolated quartiles, which are within the range of the values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of `measure`; the keys of mappings are contestants ("ours" and the baselines)."""

    errors: Mapping[str, float]
    tolerance: float
    slack: float
    seconds: Mapping[str, Spread] = field(default_factory=dict)
    """Seconds per call."""
    ratios: Mapping[str, Spread] = field(default_factory=dict)
    """Time per item of each baseline over ours, over pairs. Empty unless all are correct."""
    of_expected: Mapping[str, float] = field(default_factory=dict)
    """Median ratio over the expected one, by baseline."""
    pairs: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    """Error of each contestant that raised; such a baseline has no other figures."""
    peak_bytes: Mapping[str, int | None] = field(default_factory=dict)
    """Peak increase of memory in use during a call; None if the system does not report it."""
    work: Mapping[str, float] = field(default_factory=dict)
    """For ours, as far as known: bytes_moved, gb_per_second, of_copy_bandwidth, of_peak_bandwidth, flops,
    gflops_per_second, of_matmul_rate, of_peak_flops. Peaks are from the GPU's data sheet."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Items of `Case.rates` that ours processes per second."""
    breakdown: Mapping[str, Any] = field(default_factory=dict)
    """Result of `Case.breakdown`."""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        return not self.wrong()

    def wrong(self) -> dict[str, float]:
        """Return contestants that are not correct, with their errors; NaN or no result counts as wrong."""
        slack = dict.fromkeys(self.errors, self.slack) | {"ours": 1.0}
        found = {name: e for name, e in self.errors.items() if not e <= self.tolerance * slack[name]}
        return found if "ours" in self.errors else found | {"ours": math.nan}


def failed(error: Exception, name: str = "ours") -> Result:
    """Return the result of a case that raised."""
    return Result(errors={}, tolerance=0.0, slack=1.0, failures={name: _reason(error)})


def _reason(error: Exception) -> str:
    """Format an error on one line, without the trace that some carry."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:200]


def matmul_rate(dtype: torch.dtype, clock: Clock = time.perf_counter) -> float:
    """Return the floating-point operations per second of a large matrix product, the best of several.

    Square products of growing size are candidates. Each repeats for at most `RATE_SECONDS`; a size is skipped
    if the previous one predicts that a product takes longer, since a processor without units for the dtype
    emulates it at a hundredth of its fp32 rate. Factors are random, as products of constants draw less power.
    """
    device = "cuda" if torch.cuda.is_initialized() else "cpu"
    generator = torch.Generator().manual_seed(0)
    rate = 0.0
    for side in RATE_SIDES:
        work = 2 * side**3
        if rate and work / rate > RATE_SECONDS:
            break
        matrix = torch.randn(side, side, generator=generator).to(device, dtype)
        product = partial(torch.matmul, matrix, matrix)
        seconds_per_call(product, 1, clock)  # the first call also sets up
        start = clock()
        runs = 0
        while runs < 5 and (runs == 0 or clock() - start < RATE_SECONDS):
            rate = max(rate, work / seconds_per_call(product, 1, clock))
            runs += 1
    return rate


def measure(
    case: Case,
    effort: Effort,
    clock: Clock = time.perf_counter,
    rate_of: Callable[[torch.dtype, Clock], float] = matmul_rate,
) -> Result:
    """Check all contestants of a case, then time ours against each baseline in pairs of turns.

    Peak memory is measured last, since that returns freed memory to the system.

    `rate_of(dtype, clock)` returns the reference rate of arithmetic in FLOP/s; tests pass a constant.
    """
    baselines = {name: c for name, c in case.baselines.items() if not name.endswith(effort.without)}
    truth = case.truth()
    errors, first, failures = {}, {}, {}
    for name, contestant in {"ours": case.ours, **baselines}.items():
        start = clock()
        try:
            result = (contestant.rehearsal or contestant.run)()
            machine.synchronize()
            first[name] = clock() - start
            errors[name] = error_of(
                contestant.outputs(result), contestant.truth() if contestant.truth else truth
            )
        except Exception as error:
            if name == "ours":
                raise
            failures[name] = _reason(error)
    checked = Result(
        errors=errors, tolerance=case.tolerance, slack=case.slack, failures=failures, details=case.details
    )
    if not checked.right:
        return checked
    del truth

    baselines = {name: c for name, c in baselines.items() if name not in failures}
    everyone = {"ours": case.ours, **baselines}
    slow = {name for name in baselines if first[name] > effort.longest_extra_run}
    # A second run measures the number of calls per turn without compilation, and warms up.
    calls = {
        name: 1
        if name in slow
        else max(1, math.ceil(TURN_SECONDS / max(seconds_per_call(contestant.run, 1, clock), 1e-6)))
        for name, contestant in everyone.items()
    }
    times: dict[str, list[float]] = {name: [] for name in everyone}
    ratios = {}
    for name in baselines:
        turns = [partial(seconds_per_call, everyone[n].run, calls[n], clock) for n in ("ours", name)]
        pairs = take_turns(turns, effort, clock)
        times["ours"] += [ours for ours, _ in pairs]
        times[name] = [theirs for _, theirs in pairs]
        more = case.ours.count / baselines[name].count
        ratios[name] = Spread.of([more * theirs / ours for ours, theirs in pairs])
    if not baselines:  # all have failed
        turn = partial(seconds_per_call, case.ours.run, calls["ours"], clock)
        times["ours"] = [seconds for pair in take_turns([turn, turn], effort, clock) for seconds in pair]
    peaks = {
        name: None if name in slow else machine.peak_bytes(contestant.run)
        for name, contestant in everyone.items()
        if case.single_process
    }
    seconds = {name: Spread.of(values) for name, values in times.items()}
    return replace(
        checked,
        seconds=seconds,
        ratios=ratios,
        of_expected={
            name: ratios[name].median / ratio for name, ratio in case.expected.items() if name in ratios
        },
        pairs={name: len(times[name]) for name in baselines},
        peak_bytes=peaks,
        work=_work(case, seconds["ours"].median, effort, clock, rate_of),
        rates={name: count / seconds["ours"].median for name, count in case.rates.items()},
        breakdown=case.breakdown() if case.breakdown else {},
    )


def error_of(outputs: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Return the largest max|output - truth| / max|truth| over the tensors; NaN if an output contains NaN."""
    worst = 0.0
    for ours, true in zip(outputs, truth, strict=True):
        if ours.shape != true.shape:
            return math.inf
        scale = true.abs().max().item() or 1.0
        error = (ours.to(true.dtype) - true).abs().max().item() / scale
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst


def take_turns(
    turns: Sequence[Callable[[], float]], effort: Effort, clock: Clock
) -> list[tuple[float, float]]:
    """Return the results of two turns, pair by pair, in alternating order."""
    pairs: list[tuple[float, float]] = []
    start = clock()
    while len(pairs) < effort.min_pairs or (
        len(pairs) < effort.max_pairs and clock() - start < effort.seconds
    ):
        if len(pairs) % 2 == 0:
            pairs.append((turns[0](), turns[1]()))
        else:
            pairs.append((turns[1](), turns[0]())[::-1])
        if max(pairs[-1]) > effort.longest_repeated_turn:
            break
    return pairs


def seconds_per_call(run: Callable[[], Any], calls: int, clock: Clock) -> float:
    machine.synchronize()
    start = clock()
    for _ in range(calls):
        run()
    machine.synchronize()
    return (clock() - start) / calls


def _work(
    case: Case,
    seconds: float,
    effort: Effort,
    clock: Clock,
    rate_of: Callable[[torch.dtype, Clock], float],
) -> dict[str, float]:
    work: dict[str, float] = {}
    if case.bytes_moved is not None:
        work |= {"bytes_moved": case.bytes_moved, "gb_per_second": case.bytes_moved / seconds / 1e9}
    if case.bytes_moved is not None and case.copied is not None:
        # The copy allocates its result, as operators do: page faults are a large part of the cost.
        copy = statistics.median(
            seconds_per_call(case.copied.clone, 1, clock) for _ in range(2 * effort.min_pairs + 1)
        )
        copied_per_second = 2 * case.copied.nbytes / copy
        work["of_copy_bandwidth"] = case.bytes_moved / seconds / copied_per_second
    if case.flops is not None:
        work |= {"flops": case.flops, "gflops_per_second": case.flops / seconds / 1e9}
    if case.flops is not None and case.multiplied is not None:
        work["of_matmul_rate"] = case.flops / seconds / rate_of(case.multiplied, clock)
    if (gpu := hardware.gpu_in_use()) is not None:
        if case.bytes_moved is not None:
            work["of_peak_bandwidth"] = case.bytes_moved / seconds / gpu.bytes_per_second
        if case.flops is not None:
            fastest = gpu.flops_per_second(case.details.get("dtype", "float32"))
            work["of_peak_flops"] = case.flops / seconds / fastest
    return work


def lines(key: str, result: Result) -> list[str]:
    """Format a result: one line per baseline, then one of facts; no ratio if a result is wrong."""
    if "ours" in result.failures:
        return [f"{key}: FAILED: {result.failures['ours']}"]
    if not result.right:
        wrong = ", ".join(f"{name} has an error of {error:.1e}" for name, error in result.wrong().items())
        return [f"{key}: WRONG: {wrong}, limit {result.tolerance:.0e}; not timed"]
    text = [key]
    milliseconds = {name: spread.median * 1e3 for name, spread in result.seconds.items()}
    for name, ratio in result.ratios.items():
        text.append(
            f"  {ratio.median:7.2f} x as fast as {name} (quartiles {ratio.low:.2f} to {ratio.high:.2f}, "
            f"{result.pairs[name]} pairs): {milliseconds['ours']:.2f} ms against {milliseconds[name]:.2f}"
            + (f", {result.of_expected[name]:.0%} of expected" if name in result.of_expected else "")
        )
    text += [f"  {name} FAILED: {why}" for name, why in result.failures.items()]
    facts = [f"error {result.errors['ours']:.1e}"]
    work = result.work
    if "bytes_moved" in work:
        facts.append(f"{work['bytes_moved'] / 1e6:.1f} MB moved at {work['gb_per_second']:.1f} GB/s")
    if "of_copy_bandwidth" in work:
        facts.append(f"{work['of_copy_bandwidth']:.0%} of a copy's bandwidth")
    if "flops" in work:
        facts.append(f"{_flops(work['flops'])} at {_flops(work['gflops_per_second'] * 1e9)}/s")
    if "of_matmul_rate" in work:
        facts.append(f"{work['of_matmul_rate']:.0%} of a matrix product's rate")
    for name, unit in (("of_peak_bandwidth", "bandwidth"), ("of_peak_flops", "arithmetic")):
        if name in work:
            facts.append(f"{work[name]:.0%} of the card's {unit}")
    facts += [f"{value:.4g} {name}/s" for name, value in result.rates.items()]
    peaks = [f"{name} {peak / 2**20:.0f}" for name, peak in result.peak_bytes.items() if peak is not None]
    if peaks:
        facts.append("peak memory in MiB: " + ", ".join(peaks))
    text.append("    " + "; ".join(facts))
    if result.breakdown:
        seconds, held = result.breakdown["seconds"], result.breakdown["peak_bytes"]
        shares = ", ".join(f"{kind} {value / sum(seconds.values()):.0%}" for kind, value in seconds.items())
        sizes = ", ".join(f"{kind} {(value or 0) / 2**20:.0f}" for kind, value in held.items())
        text.append(f"    time: {shares}; peak memory in MiB: {sizes}")
    return text


def _flops(number: float) -> str:
    return f"{number / 1e12:.2f} TFLOP" if number >= 1e12 else f"{number / 1e9:.2f} GFLOP"


def as_json(about: Mapping[str, Any], results: Mapping[str, Result]) -> dict[str, Any]:
    """Return the file's contents with four significant digits, and null for non-finite numbers."""
    ratios = {
        f"{key}.ratio_vs_{name}": ratio.median
        for key, result in results.items()
        for name, ratio in result.ratios.items()
    }
    cases = {key: {"right": result.right, **_plain(result)} for key, result in results.items()}
    return {**rounded(ratios), "cases": rounded(cases), "about": rounded(about)}


def _plain(result: Result) -> dict[str, Any]:
    spreads = {name: getattr(result, name) for name in ("seconds", "ratios")}
    return vars(result) | {name: {k: vars(v) for k, v in by.items()} for name, by in spreads.items()}


def rounded(value: Any) -> Any:
    """Round the floats of a JSON value to four significant digits; null replaces non-finite ones."""
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
