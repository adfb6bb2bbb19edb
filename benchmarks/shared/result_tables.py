"""Tables of each benchmark's results, in Markdown, for the report.

A benchmark of a suite has an entry in `TABLES`, which maps its name to the function that formats its file.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

from benchmarks import roofline, scaling
from benchmarks.documents import efficiency, serving
from benchmarks.documents import linear as linear_document
from benchmarks.documents.tables import markdown
from benchmarks.efficiency.row import measured_cell
from benchmarks.static.report import kernels_of

Content = Mapping[str, Any]


def compared(content: Content) -> list[str]:
    """Return one row per case of `shared.program`: milliseconds, error, speed-ups, rates and peak memory."""
    rows = []
    for key, case in content["cases"].items():
        failures = "; ".join(f"{name} failed: {why}" for name, why in case.get("failures", {}).items())
        if not case.get("right", True):
            rows.append((key, failures or f"WRONG: errors {case['errors']}", "", "", "", ""))
            continue
        ratios = [f"{spread(ratio)} × {name}" for name, ratio in case["ratios"].items()]
        rates = [f"{figure(value)} {name}/s" for name, value in case.get("rates", {}).items()]
        work = case.get("work", {})
        rates += [f"{figure(work[name])} {unit}" for name, unit in _RATES.items() if name in work]
        peak = (case.get("peak_bytes") or {}).get("ours")
        rows.append(
            (
                key,
                spread(case["seconds"]["ours"], 1e3),
                f"{case['errors']['ours']:.0e}",
                ", ".join([*ratios, *filter(None, [failures])]),
                ", ".join(rates),
                "" if peak is None else f"{peak / 2**20:.0f}",
            )
        )
    return [markdown(("case", "ms", "error", "as fast as", "rates", "peak MiB"), rows)]


_RATES = {"gb_per_second": "GB/s", "gflops_per_second": "GFLOP/s"}


def training_steps(content: Content) -> list[str]:
    """Return one row per kind of step: seconds, rates, FLOPs per image, memory and MFU."""
    rows = []
    for name, case in content["cases"].items():
        peak, mfu = (case.get("peak_bytes") or {}).get("ours"), case.get("mfu")
        rows.append(
            (
                name,
                case["precision"],
                f"{case['images']:g}",
                spread(case["seconds"]["ours"]),
                *(figure(rate) if (rate := case["rates"].get(unit)) else "" for unit in ("images", "tokens")),
                figure(case["flops_per_image"] / 1e9),
                figure(case["gflops_per_second"]),
                "" if peak is None else f"{peak / 2**20:.0f}",
                "no known peak" if mfu is None else f"{mfu:.1%}",
            )
        )
    header = ("step", "precision", "images", "s per step", "images/s", "tokens/s", "GFLOPs per image")
    return [markdown((*header, "GFLOP/s", "peak MiB", "MFU"), rows)]


def claims(content: Content) -> list[str]:
    """Return the claims of all groups, and the comparison with fixed ratios if it was counted."""
    rows = [row for group in content["claims"].values() for row in group]
    measured = [
        (row["claim"], measured_cell(found), found["file"], f"`{found['key']}`")
        for row in rows
        if (found := row["measured"])
    ]
    tables = [efficiency.claims(rows), markdown(("measured claim", "value", "file", "key"), measured)]
    if content.get("comparison"):
        tables.append(efficiency.comparison(content["comparison"]))
    return tables


def bounds(content: Content) -> list[str]:
    """Return bounds of kernels and steps, and the compiled kernels."""
    return [*_split(roofline.lines(content)), *_split(roofline.compiled_lines(content))]


def cluster(content: Content) -> list[str]:
    """Return the best stage per number of GPUs, for the GPUs that the paper names."""
    return _split(scaling.lines(efficiency.chosen(content)))


def scaling_validation(content: Content) -> list[str]:
    """Return predicted and measured milliseconds of steps on two processes."""
    return [efficiency.validation(content)]


def launches(content: Content) -> list[str]:
    """Return the number of operators that follow the backward pass."""
    rows = [
        (
            run,
            f"{case['tensors']}",
            f"{case['per_tensor']['all']:,}",
            f"{case['foreach']['all']:,}",
            f"{case['ours']['all']:,}",
            ", ".join(f"{part} {count}" for part, count in case["ours"].items() if part != "all"),
        )
        for run, case in content["cases"].items()
    ]
    header = ("configuration", "tensors", "operators, one call per tensor", "foreach", "ours", "of which")
    return [markdown(header, rows)]


def linear(content: Content) -> list[str]:
    """Return the speed of steps with both libraries of matrix products, and the choice of `auto`."""
    return [linear_document.speed(content), markdown(("`auto` chooses",), [(content["auto"],)])]


def dispatch(content: Content) -> list[str]:
    """Return microseconds per call of both registrations."""
    rows = [
        (
            name.replace("_", " "),
            *(spread(case["processor_microseconds"][side]) for side in ("usual", "ours")),
            spread(case["usual_over_ours"]),
            spread(case["usual_over_usual"]),
        )
        for name, case in content["cases"].items()
    ]
    header = ("call", "usual, µs", "ours, µs", "ratio", "usual over itself (A/A)")
    return [markdown(header, rows)]


def straggler(content: Content) -> list[str]:
    """Return the share of time that ranks wait."""
    rows = [
        (
            key,
            f"{case['wait']:.1%}",
            f"{case['expected_wait']:.1%}" if "expected_wait" in case else "",
            f"{case['min_batch']} to {case['max_batch']}",
        )
        for key, case in content["cases"].items()
    ]
    return [markdown(("plan and ranks", "ranks wait", "expected", "images per step"), rows)]


def scoring(content: Content) -> list[str]:
    """Return the rate of each scorer, and the published seconds over its seconds."""
    published = content["published_seconds"]
    rows = [
        (
            name,
            ", ".join(f"{figure(rate)} {unit}/s" for unit, rate in row["rates"].items()),
            *(figure(row["ratio_vs_published"][other]) for other in published),
        )
        for name, row in content["scorers"].items()
    ]
    header = (f"{name}, {seconds:g} s per image" for name, seconds in published.items())
    return [markdown(("scorer", "one CPU core", *header), rows)]


def startup(content: Content) -> list[str]:
    """Return the seconds of each command."""
    rows = [(f"`{name}`", spread(row)) for name, row in content["seconds"].items()]
    return [markdown(("command", "s, median (least to most)"), rows)]


def checkpoints(content: Content) -> list[str]:
    """Return size, seconds and rates of saving and loading."""
    rows = [
        (
            name,
            figure(row["bytes"] / 1e6),
            *(f"{row[f'{what}_seconds']:.3g}" for what in ("save", "load")),
            *(figure(row[f"{what}_bytes_per_second"] / 1e6) for what in ("save", "load")),
        )
        for name, row in content["checkpoints"].items()
    ]
    header = ("tokenizer", "MB", "saving, s", "loading, s", "saving, MB/s", "loading, MB/s")
    return [markdown(header, rows)]


def schedules(content: Content) -> list[str]:
    """Return the runs of all schedules, the goals, and the rates where they were measured."""
    tables = [serving.runs(content["mixes"]), serving.goals(content["mixes"])]
    return [*tables, *([serving.rates(content["curve"])] if "points" in content["curve"] else [])]


def gpu_static(content: Content) -> list[str]:
    """Return the worst case of each compiled kernel per architecture."""

    def key(row: Mapping[str, Any]) -> tuple[str, str, int]:
        return row["case"].split(".")[0], row["name"], row["architecture"]

    rows = []
    for (op, name, architecture), group in groupby(sorted(kernels_of(content), key=key), key=key):
        kernels = list(group)
        violations = sorted({text for row in kernels for text in row["violations"]})
        rows.append(
            (
                f"`{op}` `{name}`",
                f"sm_{architecture}",
                f"{len(kernels)}",
                f"{max(row['registers'] for row in kernels)}",
                f"{max(row['spill_bytes'] for row in kernels)}",
                f"{max(row['shared_bytes'] for row in kernels) / 1024:.1f}",
                f"{min(row['occupancy'] for row in kernels):.0%}",
                "; ".join(violations) or "yes",
            )
        )
    header = ("kernel", "target", "cases", "registers", "spilled bytes", "shared KiB", "occupancy")
    return [markdown((*header, "within budget"), rows)]


TABLES: Mapping[str, Callable[[Content], list[str]]] = {
    "claims": claims,
    "kernels": compared,
    "packing": compared,
    "autoencoder": compared,
    "training_steps": training_steps,
    "loader": compared,
    "linear": linear,
    "dispatch": dispatch,
    "scoring": scoring,
    "startup": startup,
    "checkpoints": checkpoints,
    "straggler": straggler,
    "scaling_validation": scaling_validation,
    "serving": schedules,
    "launches": launches,
    "gpu_static": gpu_static,
    "roofline": bounds,
    "scaling": cluster,
    "serving_simulation": schedules,
}
"""In the order of the report."""


def spread(found: Mapping[str, float], factor: float = 1.0) -> str:
    """Format a median with its range."""
    median, low, high = (figure(found[key] * factor) for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def figure(value: float) -> str:
    """Format a number with four significant digits, or as an integer if it is larger."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _split(lines: Iterable[str]) -> list[str]:
    return ["\n".join(group) + "\n" for filled, group in groupby(lines, key=bool) if filled]
