"""Choice of the device a model runs on."""

import torch

from cat_fast.errors import UserError, first_line
from cat_fast.hardware import run_device_type


def find_device(name: str) -> torch.device:
    """Return the device of a name; "auto" selects CUDA if available, else the CPU (see `run_device_type`).

    Raises:
        UserError: the device is unknown or cannot be used.
    """
    if name == "auto":
        return torch.device(run_device_type())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used ({first_line(error)}); try --device cpu") from error
    return device
