"""What the data sheets of GPUs promise: what a run's or a benchmark's speed is a share of."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """What the data sheet of a GPU promises; none of it by sparsity."""

    bytes_per_second: float
    tensor_flops_per_second: float
    """Of bfloat16 and float16, summed in float32."""
    float32_flops_per_second: float
    """Without tensor cores."""

    def flops_per_second(self, dtype: str) -> float:
        """Of float32, tf32 (half of bfloat16's on every card listed), bfloat16 or float16."""
        if dtype == "float32":
            return self.float32_flops_per_second
        return self.tensor_flops_per_second / (2 if dtype == "tf32" else 1)


PEAKS = {  # by the name that CUDA gives the card
    "A100-SXM4-40GB": Peak(1555e9, 312e12, 19.5e12),
    "A100-PCIE-40GB": Peak(1555e9, 312e12, 19.5e12),
    "A100-SXM4-80GB": Peak(2039e9, 312e12, 19.5e12),
    "A100 80GB PCIe": Peak(1935e9, 312e12, 19.5e12),
    "H100 80GB HBM3": Peak(3350e9, 989e12, 67e12),
    "H100 PCIe": Peak(2000e9, 756e12, 51e12),
    "H200": Peak(4800e9, 989e12, 67e12),
    "A10": Peak(600e9, 125e12, 31.2e12),
    "A40": Peak(696e9, 149.7e12, 37.4e12),
    "L4": Peak(300e9, 121e12, 30.3e12),
    "L40S": Peak(864e9, 362e12, 91.6e12),
    "RTX 3090": Peak(936e9, 71e12, 35.6e12),
    "RTX 4090": Peak(1008e9, 165.2e12, 82.6e12),
}


def peak_of(name: str) -> Peak | None:
    """Of the card that CUDA calls `name`, such as "NVIDIA A100-SXM4-80GB"; None for one not listed."""
    # Its end, not a part: an A100 is no A10, and a slice of a card (MIG) has a slice of its peak.
    return next((peak for known, peak in PEAKS.items() if f" {name}".endswith(f" {known}")), None)


def peak() -> Peak | None:
    """That of the GPU in use; None on a CPU, or for a card that `PEAKS` does not know."""
    return peak_of(torch.cuda.get_device_name()) if torch.cuda.is_initialized() else None
