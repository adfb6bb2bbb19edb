"""What operators do under torch.autocast.

Attention follows it, as torch's own does: inputs are cast to the autocast dtype. Norms do not: activations
keep their dtype and statistics are fp32 whatever it is, so that nothing is gained by casting.
"""

import torch


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the autocast dtype where autocast is on; float64 stays as it is."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
