"""varlen_attention by other libraries' CUDA kernels: torch's own operator and xformers.

Both take bf16 and fp16 with a head dimension that is a multiple of 8, and are differentiable by themselves.
Their gradients are sums in whatever order blocks finish, so not the same bits twice: flash attention's are
under torch.use_deterministic_algorithms, those of cuDNN, to which torch turns on Hopper, not even then. Hence
they are for passes without gradients. Whether one runs here is found out when first asked; xformers is not
imported before.
"""

import functools
import importlib.util
from typing import Any, cast

import torch

from cat_fast.errors import first_line

from .reference import nothing


def torch_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_k: int,
) -> torch.Tensor:
    """softmax(q kᵀ / √D) v within each sequence, by torch.nn.attention.varlen."""
    from torch.nn.attention.varlen import varlen_attn

    if q.numel() == 0 or k.numel() == 0:
        return nothing(q, k, v)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
    return cast(torch.Tensor, out)  # it would be a pair had we asked for lse


def xformers_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_k: int,
) -> torch.Tensor:
    """The same by xformers.ops.memory_efficient_attention, the whole pack being one sequence under a mask."""
    from xformers.ops import memory_efficient_attention

    if q.numel() == 0 or k.numel() == 0:
        return nothing(q, k, v)
    mask = block_diagonal_mask(cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]


def block_diagonal_mask(
    cu_seqlens: torch.Tensor, max_seqlen: int, cu_seqlens_k: torch.Tensor, max_seqlen_k: int
) -> Any:
    """xformers' BlockDiagonalMask of these offsets, of the queries and of the keys.

    `BlockDiagonalMask.from_seqlens` wants the lengths on the host, so every layer would wait for the GPU. The
    kernels read only the offsets on the device and the longest length: the mask is put together from those,
    and has offsets on the host, which `materialize` reads, only where they are there already.
    """
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask, _SeqLenInfo

    def sequences(offsets: torch.Tensor, longest: int) -> Any:
        on_host = offsets.tolist() if offsets.device.type == "cpu" else []
        return _SeqLenInfo(seqstart=offsets, max_seqlen=longest, min_seqlen=0, seqstart_py=on_host)

    queries, keys = sequences(cu_seqlens, max_seqlen), sequences(cu_seqlens_k, max_seqlen_k)
    return BlockDiagonalMask(q_seqinfo=queries, k_seqinfo=keys)


@functools.cache
def torch_obstacle() -> str | None:
    """Why `torch_varlen` cannot run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return _failure(torch_varlen)


@functools.cache
def xformers_obstacle() -> str | None:
    """Why `xformers_varlen` cannot run here, or None."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _failure(xformers_varlen)


def _failure(route: Any) -> str | None:
    """What the route says to a sequence of one token and one of fifteen, forward and backward."""
    q = torch.zeros(16, 1, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    cu_seqlens = torch.tensor([0, 1, 16], dtype=torch.int32, device="cuda")
    try:
        with torch.enable_grad():
            torch.autograd.grad(route(q, q, q, cu_seqlens, 15, cu_seqlens, 15).sum(), q)
    except (ImportError, NotImplementedError, RuntimeError, TypeError) as error:
        return f"it fails here: {first_line(error)}"
    return None
