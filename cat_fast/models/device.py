"""Choice of the device a model runs on."""

import torch

from cat_fast.errors import UserError, first_line


def find_device(name: str) -> torch.device:
    """Return the device of a name; "auto" selects CUDA if available, else the CPU.

    Raises:
        UserError: the device is unknown or cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used ({first_line(error)}); try --device cpu") from error
    return device
