"""Peaks of GPUs by their data sheets, and times that follow from them.

Peaks and bandwidths are those of `cat_fast.hardware.GPUS`, which runs report their utilization by;
`benchmarks/data/gpus.json` adds memory, NVLink and sources.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat_fast.hardware import GPUS, gpu_of

FILE = Path(__file__).parents[1] / "data/gpus.json"
MATRIX_FORMATS = {"bfloat16": "bfloat16", "float16": "bfloat16", "float32": "tf32"}
"""Fastest format in which a GPU multiplies matrices of a dtype; torch lets convolutions in fp32 use TF32."""


@dataclass(frozen=True, kw_only=True)
class DataSheet:
    """One GPU, with the source of its figures."""

    model: str
    cuda_name: str
    """Key of `cat_fast.hardware.GPUS`."""
    architecture: int
    bfloat16_flops: float
    tf32_flops: float
    bytes_per_second: float
    memory_bytes: float
    source: str

    def matrix_flops(self, dtype: str) -> float:
        """Return the peak FLOPs per second of matrix products of a dtype."""
        return self.bfloat16_flops if MATRIX_FORMATS[dtype] == "bfloat16" else self.tf32_flops

    def seconds(
        self, flops: float, moved: float, dtype: str, matrix_share: float = 1.0, memory_share: float = 1.0
    ) -> float:
        """Return the time of work that is bound by matrix products or by memory, whichever takes longer.

        Args:
            flops: operations of matrix products; others do not count.
            moved: bytes read and written.
            matrix_share: share of the peak FLOPs that is reached.
            memory_share: share of the peak bandwidth that is reached.
        """
        return max(
            flops / (matrix_share * self.matrix_flops(dtype)),
            moved / (memory_share * self.bytes_per_second),
        )

    def ridge(self, dtype: str) -> float:
        """Return the arithmetic intensity, FLOPs per byte, from which arithmetic is the bound."""
        return self.matrix_flops(dtype) / self.bytes_per_second


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Shares of the peaks that predictions assume; bounds assume 1."""

    matrix_share: float
    memory_share: float
    source: str


def read_sheets(path: Path = FILE) -> tuple[Mapping[str, DataSheet], Assumptions]:
    """Read all GPUs and the assumptions of predictions.

    Raises:
        ValueError: a figure is not positive, or a share exceeds 1.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    sheets = {name: _sheet(values) for name, values in content["gpus"].items()}
    assumptions = Assumptions(**content["assumptions"])
    for name, sheet in sheets.items():
        for key, value in vars(sheet).items():
            if not isinstance(value, str) and not value > 0:
                raise ValueError(f"{path}: {name}.{key} must be positive, got {value}")
    if not (0 < assumptions.matrix_share <= 1 and 0 < assumptions.memory_share <= 1):
        raise ValueError(f"{path}: expected shares between 0 and 1, got {assumptions}")
    return sheets, assumptions


def name_of(gpu: str, sheets: Mapping[str, DataSheet]) -> str | None:
    """Return the name of the sheet of a GPU as CUDA calls it, or None if that very model has no sheet."""
    known = gpu_of(gpu)
    return next((name for name, sheet in sheets.items() if GPUS[sheet.cuda_name] is known), None)


def _sheet(values: Mapping[str, Any]) -> DataSheet:
    gpu = GPUS[values["cuda_name"]]
    return DataSheet(
        **values,
        bfloat16_flops=gpu.flops_per_second("bfloat16"),
        tf32_flops=gpu.flops_per_second("tf32"),
        bytes_per_second=gpu.bytes_per_second,
    )
