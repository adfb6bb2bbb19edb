"""torch.autocast support for the attention operators.

Attention casts its inputs to the autocast dtype, as torch's own attention does. Norms ignore autocast:
their statistics are always fp32, so casting activations would gain nothing.
"""

import torch


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors cast to the autocast dtype if autocast is enabled; float64 is left unchanged."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
