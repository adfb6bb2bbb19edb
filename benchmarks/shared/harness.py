"""Fair comparisons of speed: every rival must first be right, and then they take turns.

A benchmark is a script with a dictionary from key to a function that sets up a `Case`, which it gives to
`program.main`. That prints each comparison as it is measured and writes them all as JSON:

    "<key>.ratio_vs_<baseline>"   how many times as fast as the baseline ours is: the median over the pairs
    "cases"                       under each key: errors, seconds a call, ratios, pairs, peak memory, work
    "about"                       machine, versions, effort, load of the machine before and after

Where a result is wrong, the case has no ratio and the program ends with exit code 1.
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
    """One way of doing the work of a case."""

    run: Callable[[], Any]
    """Does it once; all of it is timed."""
    outputs: Callable[[Any], Sequence[torch.Tensor]]
    """What `run` returned, as tensors laid out like the truth; not timed."""
    truth: Callable[[], Sequence[torch.Tensor]] | None = None
    """What it should compute, where it does other work than the case's."""
    rehearsal: Callable[[], Any] | None = None
    """The same work at the size of the truth, where checking `run` would take too long."""
    count: float = 1.0
    """How many of what is compared a run gets through, such as images: ratios are of counts a second."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison: the same work done our way and in other ways."""

    ours: Contestant
    baselines: Mapping[str, Contestant]
    truth: Callable[[], Sequence[torch.Tensor]]
    """What all of them should compute, in a wider dtype."""
    tolerance: float
    """The largest max|output - truth| / max|truth| that counts as right, for each tensor."""
    slack: float = 10.0
    """Baselines may be off by this many times the tolerance: they must do the same work, not do it as well.
    (Channels-last GroupNorm of torch 2.14 is off by 2e-5 where ours is by 5e-7.)"""
    bytes_moved: int | None = None
    """What ours reads and writes, in bytes, where memory is the limit."""
    copied: torch.Tensor | None = None
    """The tensor whose copy is the yardstick of the bandwidth, beside `bytes_moved`."""
    flops: int | None = None
    """Floating-point operations of the work, where arithmetic is the limit."""
    multiplied: torch.dtype | None = None
    """The dtype of the matrix product whose rate is the yardstick of the arithmetic, beside `flops`."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """How many of what a run of ours gets through, such as tokens, to be told per second."""
    expected: Mapping[str, float] = field(default_factory=dict)
    """By baseline: the ratio that the work itself predicts."""
    breakdown: Callable[[], Mapping[str, Any]] | None = None
    """Where ours spends its time and memory; asked once, after the timing."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further facts for the JSON, such as the backend and the dtype."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long each comparison goes on: for `seconds`, but within these numbers of pairs."""

    least_pairs: int
    most_pairs: int
    seconds: float
    longest_extra_run: float = math.inf
    """Contestants slower than this, in seconds, are not run once more for their peak memory."""
    without: tuple[str, ...] = ()
    """Endings of the names of baselines to leave out."""


FULL = Effort(least_pairs=7, most_pairs=101, seconds=10.0)
QUICK = Effort(least_pairs=1, most_pairs=9, seconds=0.3, longest_extra_run=0.4, without=("compile",))
"""torch.compile would take half a minute before it runs."""
TURN_SECONDS = 0.005
"""Shorter work is repeated within a turn, until a turn takes about this long."""
RATE_SIDES = (128, 256, 512, 1024, 2048, 4096)
RATE_SECONDS = 0.2
"""Sizes of the matrix products that `matmul_rate` times, and the longest time for each of them."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Quartiles interpolate linearly, so that they lie among the values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What `measure` found; the mappings are by contestant ("ours" and the baselines)."""

    errors: Mapping[str, float]
    tolerance: float
    slack: float
    seconds: Mapping[str, Spread] = field(default_factory=dict)
    """Of one call."""
    ratios: Mapping[str, Spread] = field(default_factory=dict)
    """By baseline: its time over ours, each by its count, pair by pair. Empty unless all are right."""
    of_expected: Mapping[str, float] = field(default_factory=dict)
    """By baseline: the median ratio as a share of the expected one."""
    pairs: Mapping[str, int] = field(default_factory=dict)
    peak_bytes: Mapping[str, int | None] = field(default_factory=dict)
    """By how much a call raises the memory in use, at its height; None where the system does not tell."""
    work: Mapping[str, float] = field(default_factory=dict)
    """What is known of bytes_moved, gb_per_second, of_copy_bandwidth, of_peak_bandwidth, flops,
    gflops_per_second, of_matmul_rate and of_peak_flops of ours; a peak is that of the GPU's data sheet."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """How many of `Case.rates` ours gets through a second."""
    breakdown: Mapping[str, Any] = field(default_factory=dict)
    """What `Case.breakdown` told."""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        return not self.wrong()

    def wrong(self) -> dict[str, float]:
        """The contestants that are not right, with their errors; NaN is wrong too."""
        slack = dict.fromkeys(self.errors, self.slack) | {"ours": 1.0}
        return {name: e for name, e in self.errors.items() if not e <= self.tolerance * slack[name]}


def matmul_rate(dtype: torch.dtype, clock: Clock = time.perf_counter) -> float:
    """Return the floating-point operations per second of a large matrix product, the best of several.

    Square products of growing size are candidates. Each repeats for at most `RATE_SECONDS`, and a size is
    skipped if the size before predicts that one product takes longer: a processor without units for the dtype
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
        seconds_a_call(product, 1, clock)  # the first call also sets up
        start = clock()
        runs = 0
        while runs < 5 and (runs == 0 or clock() - start < RATE_SECONDS):
            rate = max(rate, work / seconds_a_call(product, 1, clock))
            runs += 1
    return rate


def measure(
    case: Case,
    effort: Effort,
    clock: Clock = time.perf_counter,
    rate_of: Callable[[torch.dtype, Clock], float] = matmul_rate,
) -> Result:
    """Check all contestants of a case, then time ours against each baseline in pairs of turns.

    `rate_of(dtype, clock)` is the yardstick of arithmetic, in FLOP/s; tests pass a constant.
    """
    baselines = {name: c for name, c in case.baselines.items() if not name.endswith(effort.without)}
    everyone = {"ours": case.ours, **baselines}
    truth = case.truth()
    errors, first = {}, {}
    for name, contestant in everyone.items():
        start = clock()
        result = (contestant.rehearsal or contestant.run)()
        machine.synchronize()
        first[name] = clock() - start
        errors[name] = error_of(contestant.outputs(result), contestant.truth() if contestant.truth else truth)
    checked = Result(errors=errors, tolerance=case.tolerance, slack=case.slack, details=case.details)
    if not checked.right:
        return checked
    del truth

    # This second run shows the peak, without what compiling took, and how often to repeat within a turn.
    peaks: dict[str, int | None] = {}
    calls = {}
    for name, contestant in everyone.items():
        if first[name] > effort.longest_extra_run:
            peaks[name], calls[name] = None, 1
            continue
        taken: list[float] = []

        def timed(contestant: Contestant = contestant, taken: list[float] = taken) -> None:
            taken.append(seconds_a_call(contestant.run, 1, clock))

        peaks[name] = machine.peak_bytes(timed)
        calls[name] = max(1, math.ceil(TURN_SECONDS / max(taken[0], 1e-6)))

    times: dict[str, list[float]] = {name: [] for name in everyone}
    ratios = {}
    for name in baselines:
        turns = [partial(seconds_a_call, everyone[n].run, calls[n], clock) for n in ("ours", name)]
        pairs = take_turns(turns, effort, clock)
        times["ours"] += [ours for ours, _ in pairs]
        times[name] = [theirs for _, theirs in pairs]
        more = case.ours.count / baselines[name].count
        ratios[name] = Spread.of([more * theirs / ours for ours, theirs in pairs])
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
    """The largest max|output - truth| / max|truth| over the tensors; NaN if an output holds one."""
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
    """What two turns return, pair by pair. Who goes first alternates, so that neither gains by the order."""
    pairs: list[tuple[float, float]] = []
    start = clock()
    while len(pairs) < effort.least_pairs or (
        len(pairs) < effort.most_pairs and clock() - start < effort.seconds
    ):
        if len(pairs) % 2 == 0:
            pairs.append((turns[0](), turns[1]()))
        else:
            pairs.append((turns[1](), turns[0]())[::-1])
    return pairs


def seconds_a_call(run: Callable[[], Any], calls: int, clock: Clock) -> float:
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
        # The copy allocates its result anew, as operators do: fresh pages are a good part of the cost.
        copy = statistics.median(
            seconds_a_call(case.copied.clone, 1, clock) for _ in range(2 * effort.least_pairs + 1)
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
    """A result for people: one line a baseline, then one of facts; no ratio where something is wrong."""
    if not result.right:
        wrong = ", ".join(f"{name} is off by {error:.1e}" for name, error in result.wrong().items())
        return [f"{key}: WRONG: {wrong}, allowed is {result.tolerance:.0e}; not timed"]
    told = [key]
    milliseconds = {name: spread.median * 1e3 for name, spread in result.seconds.items()}
    for name, ratio in result.ratios.items():
        told.append(
            f"  {ratio.median:7.2f} x as fast as {name} (quartiles {ratio.low:.2f} to {ratio.high:.2f}, "
            f"{result.pairs[name]} pairs): {milliseconds['ours']:.2f} ms against {milliseconds[name]:.2f}"
            + (f", {result.of_expected[name]:.0%} of what was expected" if name in result.of_expected else "")
        )
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
    told.append("    " + "; ".join(facts))
    if result.breakdown:
        seconds, held = result.breakdown["seconds"], result.breakdown["peak_bytes"]
        shares = ", ".join(f"{kind} {value / sum(seconds.values()):.0%}" for kind, value in seconds.items())
        sizes = ", ".join(f"{kind} {(value or 0) / 2**20:.0f}" for kind, value in held.items())
        told.append(f"    time: {shares}; memory at its height in MiB: {sizes}")
    return told


def _flops(number: float) -> str:
    return f"{number / 1e12:.2f} TFLOP" if number >= 1e12 else f"{number / 1e9:.2f} GFLOP"


def as_json(about: Mapping[str, Any], results: Mapping[str, Result]) -> dict[str, Any]:
    """The file's contents, to four significant digits; null where there is no finite number."""
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
    """A JSON value with its floats to four significant digits, and null where they are not finite."""
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
