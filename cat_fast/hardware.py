"""The one table of GPU facts: memory, bandwidth and peak arithmetic of known cards."""

from dataclasses import dataclass

import torch

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Figures of a card's data sheet, none of them by sparsity, and its memory."""

    bytes_per_second: float
    tensor_flops_per_second: float
    """Of bfloat16 and float16, summed in float32."""
    float32_flops_per_second: float
    """Without tensor cores."""
    model: str | None = None
    """Name on the command line, shared by cards of the same memory; None where `memory_bytes` is None."""
    memory_bytes: float | None = None
    """Memory that CUDA reports; None where it is not recorded here."""

    def flops_per_second(self, dtype: str) -> float:
        """Of float32, tf32 (half of bfloat16's on every card listed), bfloat16 or float16."""
        if dtype == "float32":
            return self.float32_flops_per_second
        return self.tensor_flops_per_second / (2 if dtype == "tf32" else 1)


GPUS = {  # by the name that CUDA gives the card
    "A100-SXM4-40GB": Gpu(1555e9, 312e12, 19.5e12, "A100-40", 39.4 * GIB),
    "A100-PCIE-40GB": Gpu(1555e9, 312e12, 19.5e12, "A100-40", 39.4 * GIB),
    "A100-SXM4-80GB": Gpu(2039e9, 312e12, 19.5e12, "A100-80", 79.1 * GIB),
    "A100 80GB PCIe": Gpu(1935e9, 312e12, 19.5e12, "A100-80", 79.1 * GIB),
    "H100 80GB HBM3": Gpu(3350e9, 989e12, 67e12, "H100-80", 79.1 * GIB),
    "H100 PCIe": Gpu(2000e9, 756e12, 51e12, "H100-80", 79.1 * GIB),
    "H200": Gpu(4800e9, 989e12, 67e12),
    "A10": Gpu(600e9, 125e12, 31.2e12),
    "A40": Gpu(696e9, 149.7e12, 37.4e12),
    "L4": Gpu(300e9, 121e12, 30.3e12),
    "L40S": Gpu(864e9, 362e12, 91.6e12),
    "RTX 3090": Gpu(936e9, 71e12, 35.6e12),
    "RTX 4090": Gpu(1008e9, 165.2e12, 82.6e12),
}

MEMORY_BYTES = {
    gpu.model: gpu.memory_bytes
    for gpu in GPUS.values()
    if gpu.model is not None and gpu.memory_bytes is not None
}
"""Memory by `Gpu.model`, for the cards whose memory is recorded."""


def gpu_of(name: str) -> Gpu | None:
    """Return the card that CUDA calls `name`, such as "NVIDIA A100-SXM4-80GB"; None for one not listed."""
    # Its end, not a part: an A100 is no A10, and a slice of a card (MIG) has a slice of its peak.
    return next((gpu for known, gpu in GPUS.items() if f" {name}".endswith(f" {known}")), None)


def gpu_in_use() -> Gpu | None:
    """Return the card that this process uses; None on a CPU, or for a card that `GPUS` does not list."""
    return gpu_of(torch.cuda.get_device_name()) if torch.cuda.is_initialized() else None
