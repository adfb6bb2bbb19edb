"""`cat-fast info`: versions, devices and kernel backends of this installation."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cat_fast import console
from cat_fast.processor import processor_name

_PACKAGES = ("cat-fast", "torch", "triton", "xformers", "deepspeed", "diffusers", "transformers")


def info(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, devices, CPU features, and the status of every kernel backend.

    CAT_FAST_BACKEND=reference|cpp|triton|cuda forces one backend for all operators.
    CAT_FAST_BACKEND=adaln=triton,group_norm_silu=cuda forces backends of individual operators.
    CAT_FAST_CPU=default|avx2|avx512 limits the instruction set of the C++ kernels.

    Examples:

        cat-fast info

        cat-fast info --json > environment.json
    """
    report = environment()
    backend, blocks = _row_invariant_blocks()
    report |= {
        "linear_backend": backend,
        "row_invariant_blocks": blocks,
        "cuda_graphs": _cuda_graphs_line(report["gpus"]),
    }
    if json_output:
        console.print_json(report)
        return
    facts = Table(show_header=False, box=None)
    facts.add_row("python", report["python"])
    for name, installed in report["packages"].items():
        facts.add_row(name, installed or Text("not installed", style="yellow"))
    facts.add_row("platform", report["platform"])
    facts.add_row("cpu", Text(_cpu_line(report["cpu"])))
    facts.add_row("bits", Text(_bits_line(backend, blocks)))
    for line in map(_gpu_line, report["gpus"]):
        facts.add_row("gpu", Text(line))
    if not report["gpus"]:
        facts.add_row("gpu", "none")
    facts.add_row("cuda graphs", Text(report["cuda_graphs"]))
    console.out.print(facts)

    kernels = Table("operator", "backend", "accepts", "status")
    for op, rows in groupby(report["kernels"], key=lambda row: row["op"]):
        for number, row in enumerate(rows):
            style = "green" if row["status"] == "active" else "dim"
            name = op if number == 0 else ""
            kernels.add_row(name, row["backend"], row["takes"], Text(row["status"], style=style))
        kernels.add_section()
    console.out.print(kernels)
    console.out.print("Each operator uses its first active backend that accepts the tensors.")


def environment() -> dict[str, Any]:
    """Return the environment as JSON values: python, platform, packages, cpu, gpus, kernels."""
    import torch

    from cat_fast.kernels import backends, library

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {
            "processor": processor_name(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "instruction_set": library.instruction_set(),
            "features": _cpu_features(),
            "threads": torch.get_num_threads(),
        },
        "gpus": _gpus(),
        "kernels": [asdict(row) for row in backends.report()],
    }


def _row_invariant_blocks() -> tuple[str, dict[str, int | None]]:
    """Return the library of products that `auto` selects, and its blocks of rows that round alike."""
    import torch

    from cat_fast.kernels.linear.op import resolve, using
    from cat_fast.kernels.linear.rounding import row_invariant_block

    backend = resolve("auto")
    with using(backend):
        return backend, {
            str(dtype).removeprefix("torch."): row_invariant_block(dtype)
            for dtype in (torch.float32, torch.bfloat16)
        }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_features() -> list[str] | None:
    """Return the instruction sets of this CPU, or None if the compiled extension is missing."""
    try:
        from cat_fast._bindings import cpu_features
    except ImportError:
        return None
    return [name for name, present in cpu_features().items() if present]


def _gpus() -> list[dict[str, Any]]:
    import torch

    return [
        {
            "name": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
        }
        for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


def _cpu_line(cpu: dict[str, Any]) -> str:
    features = "compiled extension is missing" if cpu["features"] is None else " ".join(cpu["features"])
    ours = f"C++ kernels use {cpu['instruction_set']}" if cpu["instruction_set"] else "no C++ kernels"
    return f"{cpu['processor']}; {cpu['threads']} threads; torch uses {cpu['capability']}; {ours}; {features}"


def _bits_line(backend: str, blocks: dict[str, int | None]) -> str:
    """State whether bits of an image on this CPU depend on others of its batch."""
    found = [
        f"{dtype} {'dependent' if block is None else f'independent in blocks of {block} rows'}"
        for dtype, block in blocks.items()
    ]
    return f"matrix products of a row and its neighbours, with {backend}: " + ", ".join(found)


def _gpu_line(gpu: dict[str, Any]) -> str:
    return f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['compute_capability']}"


def _cuda_graphs_line(gpus: Sequence[Any]) -> str:
    """State whether sampling replays CUDA graphs, as `cat_fast.generator.captured_step` does on GPUs."""
    from cat_fast.hardware import run_device_type

    if run_device_type() == "cuda":
        return "used: sampling replays a graph from the second step of a size on"
    reason = "DS_ACCELERATOR=cpu selects the CPU" if gpus else "there is no GPU"
    return f"not used: {reason}; sampling runs operator by operator"
