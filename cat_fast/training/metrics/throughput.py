"""Throughput of a run: rates over recent steps, and totals at the end.

The amounts of a step are sums over ranks (`images`, `tokens`, `flops`: cat_fast.training.metrics.flops). Its
time is the wall-clock time between two records, including data loading, checkpoints and grids.
"""

import json
import resource
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from cat_fast import hardware
from cat_fast.data.files import atomic_write
from cat_fast.processor import processor_name
from cat_fast.training.runtime.ranks import Ranks

SUMMARY = "summary.json"
AMOUNTS = ("images", "tokens", "flops")
_WINDOW = 50


class Throughput:
    """Rates over the last 50 steps.

    Args:
        peak_flops: peak FLOPs per second of all GPUs of the run; None if unknown.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        self.peak_flops = peak_flops
        self.recent: deque[tuple[float, dict[str, float]]] = deque(maxlen=_WINDOW)

    def add(self, seconds: float, metrics: Mapping[str, float]) -> None:
        self.recent.append((seconds, {name: metrics[name] for name in AMOUNTS if name in metrics}))

    def rates(self) -> dict[str, float]:
        """Return steps per second and, if the metrics contain them, the other rates of `rates`."""
        seconds = sum(taken for taken, _ in self.recent)
        if seconds <= 0:
            return {}
        totals = {"steps": float(len(self.recent))}
        for _, work in self.recent:
            for name, amount in work.items():
                totals[name] = totals.get(name, 0.0) + amount
        return rates(totals, seconds, self.peak_flops)


def rates(totals: Mapping[str, float], seconds: float, peak_flops: float | None) -> dict[str, float]:
    """Return each amount per second, and `mfu` (model FLOPs utilization), the fraction of `peak_flops`."""
    found = {f"{name}_per_second": amount / seconds for name, amount in totals.items()}
    if peak_flops and "flops" in totals:
        found["mfu"] = totals["flops"] / seconds / peak_flops
    return found


def peak_flops(ranks: Ranks, precision: str) -> float | None:
    """Return the peak FLOPs per second of the run's GPUs for its matrix products; None if unknown."""
    known = hardware.gpu_in_use()
    return None if known is None else ranks.world_size * known.flops_per_second(matmul_format(precision))


def matmul_format(precision: str) -> str:
    """Return the number format in which a run of this precision, `fp32` or `bf16`, multiplies matrices."""
    if precision == "bf16":
        return "bfloat16"
    # torch lets convolutions use TF32 by default.
    tf32 = torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "float32"


def summarize(records: Iterable[Mapping[str, float]], peak_flops: float | None = None) -> dict[str, Any]:
    """Compute the steps, hours, images, tokens, FLOPs and mean rates of a run from its records."""
    seconds, totals = 0.0, {"steps": 0.0}
    for record in records:
        seconds += record["seconds"]
        totals["steps"] += 1
        for name in AMOUNTS:
            if name in record:
                totals[name] = totals.get(name, 0.0) + record[name]
    counts = {name: int(amount) for name, amount in totals.items()}
    return {**counts, "hours": seconds / 3600, **(rates(totals, seconds, peak_flops) if seconds else {})}


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    with atomic_write(folder / SUMMARY) as part:
        part.write_text(json.dumps(summary, indent=1) + "\n")


def peak_bytes(ranks: Ranks) -> int:
    """Collective: return the largest peak memory of any rank so far.

    It is the peak of torch's allocator on a GPU, and the resident memory of the process on a CPU.
    """
    own = (
        torch.cuda.max_memory_allocated()
        if ranks.device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB: getrusage(2)
    )
    per_rank = torch.zeros(ranks.world_size, dtype=torch.float64, device=ranks.device)
    per_rank[ranks.rank] = own
    return int(ranks.sum(per_rank).max())


def device_name(ranks: Ranks) -> str:
    return torch.cuda.get_device_name() if ranks.device.type == "cuda" else processor_name()


def format_summary(summary: Mapping[str, Any]) -> str:
    """Return the summary as one line."""
    parts = [f"{summary['steps']:,} steps in {timedelta(seconds=round(summary['hours'] * 3600))}"]
    parts += [f"{summary[name]:,} {name}" for name in ("images", "tokens") if name in summary]
    parts += format_rates(summary)
    if "peak_bytes" in summary:
        parts.append(f"peak memory {summary['peak_bytes'] / 2**30:.2f} GiB per rank")
    return ", ".join(parts)


def format_rates(rates: Mapping[str, float]) -> list[str]:
    """Return the known rates in readable units, such as `38.4 GFLOP/s`."""
    formatted = [
        f"{_format_number(rates[f'{name}_per_second'])} {name}/s"
        for name in ("images", "tokens")
        if f"{name}_per_second" in rates
    ]
    if "flops_per_second" in rates:
        tera = rates["flops_per_second"] / 1e12
        value, unit = (tera, "TFLOP/s") if tera >= 1 else (tera * 1e3, "GFLOP/s")
        formatted.append(f"{_format_number(value)} {unit}")
    if "mfu" in rates:
        formatted.append(f"MFU {rates['mfu']:.1%}")
    return formatted


def _format_number(value: float) -> str:
    """Format with three significant digits, or as an integer from 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
