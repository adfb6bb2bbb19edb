"""How fast a run is: rates over its last steps while it goes on, and its totals at the end.

A step's metrics say what all ranks did in it together (`images`, `tokens`, `flops`:
cat_fast.training.metrics.flops); time is wall clock from one step's record to the next, so that waiting for
data, checkpoints and grids count.
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
WORK = ("images", "tokens", "flops")
_WINDOW = 50


class Throughput:
    """Rates over the last steps.

    Args:
        peak_flops: what all GPUs of the run promise together, a second; None where it is not known.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        self.peak_flops = peak_flops
        self.recent: deque[tuple[float, dict[str, float]]] = deque(maxlen=_WINDOW)

    def add(self, seconds: float, metrics: Mapping[str, float]) -> None:
        self.recent.append((seconds, {name: metrics[name] for name in WORK if name in metrics}))

    def rates(self) -> dict[str, float]:
        """Steps a second and, of what the metrics told, images, tokens, FLOPs, `mfu`: see `rates`."""
        seconds = sum(taken for taken, _ in self.recent)
        if seconds <= 0:
            return {}
        totals = {"steps": float(len(self.recent))}
        for _, work in self.recent:
            for name, amount in work.items():
                totals[name] = totals.get(name, 0.0) + amount
        return rates(totals, seconds, self.peak_flops)


def rates(totals: Mapping[str, float], seconds: float, peak_flops: float | None) -> dict[str, float]:
    """Amounts a second; `mfu`, model FLOPs utilisation, is the share of `peak_flops` that was made use of."""
    found = {f"{name}_per_second": amount / seconds for name, amount in totals.items()}
    if peak_flops and "flops" in totals:
        found["mfu"] = totals["flops"] / seconds / peak_flops
    return found


def peak_flops(ranks: Ranks, precision: str) -> float | None:
    """What the run's GPUs promise together in the arithmetic of its matrix products, a second."""
    known = hardware.gpu_in_use()
    return None if known is None else ranks.world_size * known.flops_per_second(arithmetic(precision))


def arithmetic(precision: str) -> str:
    """In which format a run of this precision, `fp32` or `bf16`, multiplies matrices."""
    if precision == "bf16":
        return "bfloat16"
    # torch lets convolutions use TF32 unless told otherwise.
    tf32 = torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "float32"


def summarize(records: Iterable[Mapping[str, float]], peak_flops: float | None = None) -> dict[str, Any]:
    """Steps, hours, images, tokens, FLOPs and mean rates of a run, by its records."""
    seconds, totals = 0.0, {"steps": 0.0}
    for record in records:
        seconds += record["seconds"]
        totals["steps"] += 1
        for name in WORK:
            if name in record:
                totals[name] = totals.get(name, 0.0) + record[name]
    whole = {name: int(amount) for name, amount in totals.items()}
    return {**whole, "hours": seconds / 3600, **(rates(totals, seconds, peak_flops) if seconds else {})}


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    with atomic_write(folder / SUMMARY) as part:
        part.write_text(json.dumps(summary, indent=1) + "\n")


def peak_bytes(ranks: Ranks) -> int:
    """The most memory that a rank has held so far, on the rank where that is most; every rank calls this.

    Of torch's allocator on a GPU, of the whole process (resident) on a CPU.
    """
    own = (
        torch.cuda.max_memory_allocated()
        if ranks.device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB: getrusage(2)
    )
    everyones = torch.zeros(ranks.world_size, dtype=torch.float64, device=ranks.device)
    everyones[ranks.rank] = own
    return int(ranks.sum(everyones).max())


def device_name(ranks: Ranks) -> str:
    return torch.cuda.get_device_name() if ranks.device.type == "cuda" else processor_name()


def spell(summary: Mapping[str, Any]) -> str:
    """The summary in one line."""
    parts = [f"{summary['steps']:,} steps in {timedelta(seconds=round(summary['hours'] * 3600))}"]
    parts += [f"{summary[name]:,} {name}" for name in ("images", "tokens") if name in summary]
    parts += spell_rates(summary)
    if "peak_bytes" in summary:
        parts.append(f"at most {summary['peak_bytes'] / 2**30:.2f} GiB a rank")
    return ", ".join(parts)


def spell_rates(rates: Mapping[str, float]) -> list[str]:
    """As a person reads them, leaving out what is not known."""
    spelled = [
        f"{_short(rates[f'{name}_per_second'])} {name}/s"
        for name in ("images", "tokens")
        if f"{name}_per_second" in rates
    ]
    if "flops_per_second" in rates:
        tera = rates["flops_per_second"] / 1e12
        spelled.append(f"{_short(tera)} TFLOP/s" if tera >= 1 else f"{_short(tera * 1e3)} GFLOP/s")
    if "mfu" in rates:
        spelled.append(f"MFU {rates['mfu']:.1%}")
    return spelled


def _short(value: float) -> str:
    """Three digits, and those before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
