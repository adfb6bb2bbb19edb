"""Copies of small tensors from the host that do not wait for the device."""

from collections.abc import Sequence

import torch

_ALIGNMENT = 8


def copy_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copy CPU tensors to a device in one transfer, for which the host does not wait.

    A copy that the host waits for would drain the device's queue at every step.
    """
    if device.type == "cpu":
        return list(tensors)
    parts, spans, start = [], [], 0
    for tensor in tensors:
        data = tensor.contiguous().flatten().view(torch.uint8)
        spans.append((start, data.numel()))
        parts.append(torch.nn.functional.pad(data, (0, -data.numel() % _ALIGNMENT)))
        start += parts[-1].numel()
    together = torch.cat(parts).to(device, non_blocking=True)
    return [
        together[first : first + size].view(tensor.dtype).view(tensor.shape)
        for tensor, (first, size) in zip(tensors, spans, strict=True)
    ]
