"""Device, dtype and identity of a model of transformers."""

import hashlib
from typing import Any

import torch

from cat_fast.errors import UserError, one_line
from cat_fast.hardware import run_device_type

_SAMPLE = 16
"""Values per weight in the fingerprint."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def choose_device(name: str | None) -> torch.device:
    """Return a device by its name; by default CUDA if available, else the CPU.

    Raises:
        UserError: it cannot be used.
    """
    try:
        device = torch.device(name or run_device_type())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used ({one_line(error)[:200]}); try cpu") from error
    return device


def choose_dtype(
    dtype: str | torch.dtype | None, device: torch.device, default: str | torch.dtype = "auto"
) -> str | torch.dtype:
    """Return a floating-point dtype; by default float32 on the CPU and `default` on other devices.

    Raises:
        UserError: it is not a floating-point dtype.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else default
    value = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise UserError(f"expected a dtype such as bfloat16, got {dtype!r}")
    return value


def fingerprint(model: Any, tokenizer: Any, chat_template: str | None) -> str:
    """Return a hash of dtype, tokenizer, and every weight's sum of bit patterns and some values."""
    digest = hashlib.sha256(f"{model.dtype}\0{chat_template}".encode())
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    for name, weight in sorted(model.state_dict().items()):
        bits = weight.contiguous().flatten().view(_BITS[weight.element_size()])
        values = bits[:: max(len(bits) // _SAMPLE, 1)].tolist()
        total = int(bits.sum(dtype=torch.int64))  # of integers, so that it does not depend on the order
        digest.update(f"{name} {tuple(weight.shape)} {total} {values}".encode())
    return digest.hexdigest()
