"""Dtype and library of matrix products of a trained model, and the record of how outputs were computed."""

from collections.abc import Mapping
from typing import Any

import torch

from cat_fast.errors import UserError
from cat_fast.kernels import backends
from cat_fast.kernels.linear.op import DEFAULT, resolve, selected

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; "auto" selects bf16 on GPUs with bf16 tensor cores, else fp32.

    fp32 on a GPU then uses TF32 for matrix products and convolutions, unless
    `torch.set_float32_matmul_precision` was called before.

    Raises:
        UserError: the name is unknown.
    """
    if name not in ("auto", *DTYPES):
        raise UserError(f"--dtype {name}: expected auto, {', '.join(DTYPES)}")
    if name == "auto":
        dtype = torch.bfloat16 if _has_bf16(device) else torch.float32
    else:
        dtype = DTYPES[name]
    if device.type == "cuda" and dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        torch.set_float32_matmul_precision("high")
    return dtype


def option_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype in `DTYPES`."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name under which a dtype is recorded, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def find_linear_backend(setting: str, recorded: Mapping[str, Any], device: torch.device) -> str:
    """Return the library of matrix products for a folder: that of its content, if `setting` is "auto".

    Args:
        recorded: settings of the folder's content, with `execution_settings`; empty if it has none.

    Raises:
        UserError: unknown setting, or a torch without the library.
    """
    if setting == "auto" and recorded:
        return recorded.get("linear_backend") or DEFAULT
    return resolve(setting) if device.type == "cpu" else DEFAULT


def execution_settings(dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    """Return the dtype and the selected library of matrix products for the settings of a folder's content.

    A dtype of None stands for fp32.
    """
    return {
        "dtype": None if dtype == torch.float32 else dtype_name(dtype),
        "linear_backend": selected(),
    }


def describe_execution(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return device, dtype, versions, and the first active backend of each operator, as JSON values."""
    active: dict[str, str] = {}
    for row in backends.report():
        if row.status == "active":
            active.setdefault(row.op, row.backend)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": dtype_name(dtype),
        "tf32": device.type == "cuda"
        and dtype == torch.float32
        and torch.get_float32_matmul_precision() != "highest",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "linear_backend": selected() if device.type == "cpu" else None,
        "backends": active,
    }


def _has_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
