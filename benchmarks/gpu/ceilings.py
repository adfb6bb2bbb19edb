"""Largest bandwidth of a copy and largest rate of a matrix product, on random data."""

import torch

from benchmarks.gpu.body import Context
from benchmarks.gpu.timing import alternate
from cat_fast.hardware import gpu_in_use, run_device_type

MATMULS = {
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
    "tf32": (torch.float32, "high"),
    "float32": (torch.float32, "highest"),
}


def ceilings(context: Context) -> None:
    """Record the ceilings; random data, because constants draw less power and run faster."""
    device = torch.device(run_device_type())
    size = 2**16 if context.dry else 2**30
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    times = alternate({"copy": [lambda: target.copy_(source)]}, 1.0, device)["copy"]
    sheet = gpu_in_use()
    context.record.figure(
        "copy_bandwidth",
        2 * source.nbytes / min(times).seconds,
        "B/s",
        data_sheet=None if sheet is None else sheet.bytes_per_second,
    )
    for name, (dtype, precision) in MATMULS.items():
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        rate = 0.0
        for side in (64,) if context.dry else (4096, 8192):
            a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
            out = torch.empty(side, side, device=device, dtype=dtype)

            def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
                torch.mm(a, b, out=out)

            times = alternate({"product": [product]}, 0.7, device, rounds=12)["product"]
            rate = max(rate, 2 * side**3 / min(times).seconds)
        torch.set_float32_matmul_precision(before)
        peak = None if sheet is None else sheet.flops_per_second(name)
        context.record.figure(f"matmul_{name}", rate, "FLOP/s", data_sheet=peak)
