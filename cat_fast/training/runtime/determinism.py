"""Equal bits at every repeat of a run on GPUs."""

import os

import torch

from cat_fast.hardware import run_device_type


def set_determinism(deterministic: bool) -> None:
    """Make all kernels of this process deterministic, or allow the fastest; call before CUDA is initialized.

    Kernels on the CPU are deterministic in any case. On GPUs, cuDNN's convolutions, cuBLAS with its default
    workspace, FlashAttention's gradients and `index_add` vary by default: their sums depend on the order in
    which blocks finish. An operator without a deterministic kernel warns.
    """
    if run_device_type() == "cpu":
        return
    torch.backends.cudnn.benchmark = not deterministic  # times its kernels once per shape
    if not deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # max_pool2d of LPIPS has no deterministic kernel
    # SDPA's fused kernels vary under warn_only; varlen attention has its own switch.
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # only for tests, and it takes time
    torch.backends.cudnn.deterministic = True
