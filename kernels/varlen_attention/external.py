"""varlen_attention through other libraries' CUDA kernels: torch's own operator and xformers.

Both accept bf16 and fp16 with a head dimension that is a multiple of 8, and are differentiable. Their
gradients are summed in the order in which blocks finish, so they are not deterministic. FlashAttention's are
under torch.use_deterministic_algorithms, but cuDNN's, which torch uses on Hopper, are not. Hence they serve
only passes without gradients. Availability is probed on first use, and xformers is not imported before that.
"""

import functools
import importlib.util
from typing import Any, cast

import torch

from cat_fast.errors import first_line

from .reference import zero_output


def torch_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_k: int,
) -> torch.Tensor:
    """Compute softmax(q kᵀ / √D) v within each sequence with torch.nn.attention.varlen."""
    from torch.nn.attention.varlen import varlen_attn

    if q.numel() == 0 or k.numel() == 0:
        return zero_output(q, k, v)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
    return cast(torch.Tensor, out)  # a pair only if lse is requested


def xformers_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_k: int,
) -> torch.Tensor:
    """Compute the same with xformers.ops.memory_efficient_attention, as one sequence under a block mask."""
    from xformers.ops import memory_efficient_attention

    if q.numel() == 0 or k.numel() == 0:
        return zero_output(q, k, v)
    mask = block_diagonal_mask(cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]


def block_diagonal_mask(
    cu_seqlens: torch.Tensor, max_seqlen: int, cu_seqlens_k: torch.Tensor, max_seqlen_k: int
) -> Any:
    """Return xformers' BlockDiagonalMask for the offsets of the queries and of the keys.

    `BlockDiagonalMask.from_seqlens` needs the lengths on the host, so every layer would wait for the GPU. The
    kernels read only the offsets on the device and the longest length, so the mask is built from those. It
    contains offsets on the host, which only `materialize` reads, if the offsets are on the CPU.
    """
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask, _SeqLenInfo

    def sequences(offsets: torch.Tensor, longest: int) -> Any:
        on_host = offsets.tolist() if offsets.device.type == "cpu" else []
        return _SeqLenInfo(seqstart=offsets, max_seqlen=longest, min_seqlen=0, seqstart_py=on_host)

    queries, keys = sequences(cu_seqlens, max_seqlen), sequences(cu_seqlens_k, max_seqlen_k)
    return BlockDiagonalMask(q_seqinfo=queries, k_seqinfo=keys)


@functools.cache
def torch_unavailable_reason() -> str | None:
    """Return why `torch_varlen` cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return _probe_error(torch_varlen)


@functools.cache
def xformers_unavailable_reason() -> str | None:
    """Return why `xformers_varlen` cannot run here, or None."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _probe_error(xformers_varlen)


def _probe_error(function: Any) -> str | None:
    """Run forward and backward on two sequences of 1 and 15 tokens; return the error message, or None."""
    q = torch.zeros(16, 1, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    cu_seqlens = torch.tensor([0, 1, 16], dtype=torch.int32, device="cuda")
    try:
        with torch.enable_grad():
            torch.autograd.grad(function(q, q, q, cu_seqlens, 15, cu_seqlens, 15).sum(), q)
    except (ImportError, NotImplementedError, RuntimeError, TypeError) as error:
        return f"it fails here: {first_line(error)}"
    return None
