"""Device of a run, known GPUs, and errors of exhausted memory."""

import os
from dataclasses import dataclass

import torch

from cat_fast.errors import UserError

GIB = 2**30
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "could not create a memory")


@dataclass(frozen=True)
class Gpu:
    """A GPU's memory and its data sheet's figures, without sparsity."""

    bytes_per_second: float
    tensor_flops_per_second: float
    """Peak of bfloat16 and float16 with float32 accumulation."""
    float32_flops_per_second: float
    """Peak without tensor cores."""
    model: str | None = None
    """Name on the command line, shared by GPUs of the same memory; None if `memory_bytes` is None."""
    memory_bytes: float | None = None
    """Memory that CUDA reports; None if it is not known."""

    def flops_per_second(self, dtype: str) -> float:
        """Return the peak of float32, tf32 (half of bfloat16's on all of these GPUs), bfloat16 or float16."""
        if dtype == "float32":
            return self.float32_flops_per_second
        return self.tensor_flops_per_second / (2 if dtype == "tf32" else 1)


GPUS = {  # keyed by the name that CUDA reports
    "A100-SXM4-40GB": Gpu(1555e9, 312e12, 19.5e12, "A100-40", 39.4 * GIB),
    "A100-PCIE-40GB": Gpu(1555e9, 312e12, 19.5e12, "A100-40", 39.4 * GIB),
    "A100-SXM4-80GB": Gpu(2039e9, 312e12, 19.5e12, "A100-80", 79.1 * GIB),
    "A100 80GB PCIe": Gpu(1935e9, 312e12, 19.5e12, "A100-80", 79.1 * GIB),
    "H100 80GB HBM3": Gpu(3350e9, 989e12, 67e12, "H100-80", 79.1 * GIB),
    "H100 PCIe": Gpu(2000e9, 756e12, 51e12, "H100-80", 79.1 * GIB),
    "H100 NVL": Gpu(3900e9, 835e12, 60e12),
    "H200": Gpu(4800e9, 989e12, 67e12, "H200", 139.8 * GIB),
    "H200 NVL": Gpu(4800e9, 835e12, 60e12),
    "GH200 480GB": Gpu(4000e9, 989e12, 67e12),
    "GH200 144G HBM3e": Gpu(4900e9, 989e12, 67e12),
    "B200": Gpu(8000e9, 2250e12, 75e12, "B200", 178.3 * GIB),
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
"""Memory by `Gpu.model`, for the GPUs whose memory is known."""


def run_device_type() -> str:
    """Return the type of device that runs use: "cuda" if available, else "cpu"; DS_ACCELERATOR selects one.

    DeepSpeed reads the same variable.

    Raises:
        UserError: DS_ACCELERATOR is neither cuda nor cpu, or is cuda without a CUDA device.
    """
    wanted, available = os.environ.get("DS_ACCELERATOR"), torch.cuda.is_available()
    if wanted not in (None, "", "cuda", "cpu"):
        raise UserError(f"DS_ACCELERATOR={wanted}: expected cuda or cpu, or leave it unset")
    if wanted == "cuda" and not available:
        raise UserError("DS_ACCELERATOR=cuda: no CUDA device is available; unset it, or set it to cpu")
    return wanted or ("cuda" if available else "cpu")


def gpu_of(name: str) -> Gpu | None:
    """Return the GPU that CUDA calls `name`, such as "NVIDIA A100-SXM4-80GB", or None if it is not listed."""
    # Match the end of the name: "A10" must not match an A100, nor "A100" a MIG slice of one.
    return next((gpu for known, gpu in GPUS.items() if f" {name}".endswith(f" {known}")), None)


def gpu_in_use() -> Gpu | None:
    """Return the GPU that this process uses; None on a CPU, or for a GPU that is not in `GPUS`."""
    return gpu_of(torch.cuda.get_device_name()) if torch.cuda.is_initialized() else None


def release_memory() -> None:
    """Return the memory of freed tensors to the GPU; call it outside of the handler of an error.

    The error holds the tensors of the failed call.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for an allocation that failed on a CPU or GPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        fragment in str(error) for fragment in _OUT_OF_MEMORY
    )
