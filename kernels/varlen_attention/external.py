"""varlen_attention through other libraries' CUDA kernels: FlashAttention 3, that in torch, and xformers.

All accept bf16 and fp16 with a head dimension that is a multiple of 8. `flash3` calls the package
flash_attn_interface, on Hopper. `flash` calls aten's operators, which are FlashAttention 2. torch's public
function would use cuDNN on Hopper past 128 tokens, which builds a plan per shape; so it is called with
`num_splits=1`, which keeps FlashAttention, but in the forward pass only. FlashAttention's gradients are the
same at every call under torch.use_deterministic_algorithms, xformers' are not.

Whether a kernel runs, and is right, is probed at its first use on a device, with the dtype and head dimension
of the tensors and more than 128 tokens. No other library is imported before that.
"""

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from cat_fast.errors import first_line

from .. import cuda_coverage, derivatives
from .reference import varlen_attention_reference, zero_output

FAILURES = (
    ImportError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    IndexError,
    AssertionError,
    AttributeError,
)
"""Errors for which a kernel counts as not available; the next backend of the table runs."""
PROBED_LENGTHS = (1, 15, 200)
"""Tokens of the probe's sequences; some kernels are chosen past 128 only."""
PROBE_TOLERANCE = 0.05
"""Largest error of a probe, as a share of the largest value; bf16 has errors of up to 1e-2."""
FORWARD = ("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal")
BACKWARD = ("grad_out", "query", "key", "value", "out", "logsumexp", *FORWARD[3:])
"""Leading arguments of aten's two FlashAttention operators, in torch 2.10 to 2.14."""
_LOG = logging.getLogger("cat_fast.kernels")
_failed: dict[tuple[str, torch.device, torch.dtype, int], str] = {}
"""Why a call has failed, by backend, device, dtype and head dimension."""


def _adapter(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a library's attention with the arguments and derivatives of the operator.

    Args:
        attend: called with q, k, v, the offsets of queries and of keys, and the two longest lengths, if there
            are tokens. It needs gradients only; further derivatives are those of the reference.
    """

    @functools.wraps(attend)
    def adapted(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_k: int,
    ) -> torch.Tensor:
        if q.numel() == 0 or k.numel() == 0:
            return zero_output(q, k, v)

        def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend(q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)

        def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return varlen_attention_reference(q, k, v, cu_seqlens, cu_seqlens_k)

        return derivatives.with_formula(formula, function, q, k, v)

    return adapted


@_adapter
def flash3_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths: Any) -> torch.Tensor:
    """Compute softmax(q kᵀ / √D) v within each sequence with FlashAttention 3."""
    from flash_attn_interface import flash_attn_varlen_func

    deterministic = torch.are_deterministic_algorithms_enabled()
    return cast(torch.Tensor, flash_attn_varlen_func(q, k, v, *lengths, deterministic=deterministic))


@_adapter
def flash_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths: Any) -> torch.Tensor:
    """Compute the same with aten's FlashAttention."""
    return cast(torch.Tensor, _Flash.apply(q, k, v, *lengths))


class _Flash(torch.autograd.Function):
    """aten's FlashAttention operators, whose backward pass is deterministic if torch's flag is on.

    Under `warn_only`, which a run needs for other operators, aten's own gradient formula would only warn.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen: int,
        max_seqlen_k: int,
    ) -> torch.Tensor:
        ctx.longest = max_seqlen, max_seqlen_k
        lengths = cu_seqlens, cu_seqlens_k, *ctx.longest
        out, lse, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *lengths, 0.0, False, False
        )
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, cu_seqlens_k, rng_state, unused)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, cu_seqlens, cu_seqlens_k, rng_state, unused = ctx.saved_tensors
        lengths = cu_seqlens, cu_seqlens_k, *ctx.longest
        with _strict_determinism():
            gradients = torch.ops.aten._flash_attention_backward(
                grad, *tensors, *lengths, 0.0, False, rng_state, unused
            )
        return (*gradients, None, None, None, None)


@contextmanager
def _strict_determinism() -> Iterator[None]:
    """If torch.use_deterministic_algorithms is on, turn its `warn_only` off meanwhile."""
    warns = (
        torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    )
    if warns:
        torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        if warns:
            torch.use_deterministic_algorithms(True, warn_only=True)


@_adapter
def torch_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths: Any) -> torch.Tensor:
    """Compute the same with torch.nn.attention.varlen of torch 2.14 or newer.

    Its backward pass does not keep `num_splits` and runs cuDNN, on statistics of FlashAttention.
    """
    from torch.nn.attention.varlen import varlen_attn

    return cast(torch.Tensor, varlen_attn(q, k, v, *lengths, num_splits=1))


@_adapter
def xformers_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths: Any) -> torch.Tensor:
    """Compute the same with xformers.ops.memory_efficient_attention, as one sequence under a block mask."""
    from xformers.ops import memory_efficient_attention

    mask = block_diagonal_mask(*lengths)
    return cast(torch.Tensor, memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0])


def block_diagonal_mask(
    cu_seqlens: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen: int, max_seqlen_k: int
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


def schema_reason(forward: Any, backward: Any) -> str | None:
    """Return why aten's schemas are not those that `flash_varlen` calls, or None.

    The leading arguments must have the known names, and all others of the forward operator but
    `return_debug_mask` a default.
    """
    names = [argument.name for argument in forward.arguments]
    if tuple(names[: len(FORWARD) + 1]) != (*FORWARD, "return_debug_mask"):
        return f"unknown arguments of aten::_flash_attention_forward: {', '.join(names)}"
    rest = forward.arguments[len(FORWARD) + 1 :]
    if missing := [argument.name for argument in rest if not argument.has_default_value()]:
        return f"aten::_flash_attention_forward needs {missing[0]}"
    names = [argument.name for argument in backward.arguments]
    if tuple(names[: len(BACKWARD)]) != BACKWARD:
        return f"unknown arguments of aten::_flash_attention_backward: {', '.join(names)}"
    return None


@functools.cache
def flash3_unavailable_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why `flash3_varlen` cannot run on a device with this dtype and head dimension, or None."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "flash_attn_interface is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = cuda_coverage.capability_of(device.index or 0)
    if capability[0] != 9:
        return f"expected compute capability 9.0, got {'.'.join(map(str, capability))}"
    try:
        importlib.import_module("flash_attn_interface")
    except FAILURES as error:  # built for another torch, such as
        return f"it does not load: {first_line(error)}"
    if not hasattr(torch.ops.flash_attn_3, "_flash_attn_forward"):
        return "this version of flash_attn_interface does not work with torch.compile"
    return _probe_error(flash3_varlen, device, dtype, head_dim)


@functools.cache
def flash_unavailable_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why `flash_varlen` cannot run there, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        operators = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
        reason = schema_reason(*(operator.default._schema for operator in operators))
    except AttributeError as error:
        reason = f"torch {torch.__version__} has no such operator ({error})"
    return reason or _probe_error(flash_varlen, device, dtype, head_dim)


@functools.cache
def torch_unavailable_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why `torch_varlen` cannot run there, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return _probe_error(torch_varlen, device, dtype, head_dim, backward=False)


@functools.cache
def xformers_unavailable_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why `xformers_varlen` cannot run there, or None."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _probe_error(xformers_varlen, device, dtype, head_dim)


def _probe_error(
    function: Any, device: torch.device, dtype: torch.dtype, head_dim: int, backward: bool = True
) -> str | None:
    """Run a few sequences; return the error message, how results differ from the reference, or None."""
    tokens, longest = sum(PROBED_LENGTHS), max(PROBED_LENGTHS)
    generator = torch.Generator().manual_seed(0)
    try:
        with unset_fake_temporarily():
            random = torch.randn(2, tokens, 1, head_dim, generator=generator).to(device, dtype)
            offsets = torch.tensor([0, *PROBED_LENGTHS]).cumsum(0, dtype=torch.int32).to(device)
            lengths = offsets, longest, offsets, longest
            found = _probe(lambda *qkv: function(*qkv, *lengths), random, backward)
            expected = _probe(
                lambda q, k, v: varlen_attention_reference(q, k, v, offsets, offsets),
                random.float(),
                backward,
            )
            reason = _difference(found, expected)
    except FAILURES as error:
        reason = f"it fails here: {first_line(error)}"
    if reason is not None:
        _LOG.warning("varlen_attention by %s on %s: %s", function.__name__, device, reason)
    return reason


def _difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str | None:
    for name, ours, truth in zip(("result", "gradient"), found, expected, strict=False):
        error = ((ours.float() - truth).abs().max() / truth.abs().max()).item()
        if not error < PROBE_TOLERANCE:
            return f"its {name} differs from the reference by {error:.2g} of the largest value"
    return None


def _probe(function: Any, random: torch.Tensor, backward: bool) -> tuple[torch.Tensor, ...]:
    """Return the attention of random values to themselves and, if `backward`, their gradient."""
    x, grad = random
    with torch.inference_mode(False), torch.set_grad_enabled(backward), torch.autocast("cuda", enabled=False):
        x = x.clone().requires_grad_(backward)
        y = function(x, x, x)
        return (y, *torch.autograd.grad(y, x, grad)) if backward else (y,)


def failed_reason(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why an earlier call of a backend has failed there, or None."""
    return _failed.get((backend, device, dtype, head_dim))


def number_of_failures() -> int:
    """Return how often `set_failed` has taken away a backend."""
    return len(_failed)


def set_failed(backend: str, q: torch.Tensor, error: Exception) -> None:
    """Note that a call has failed, so that the next backend of the table runs from now on; log it once."""
    key = (backend, q.device, q.dtype, q.shape[-1])
    _failed[key] = f"it failed here: {first_line(error)}"
    _LOG.warning("varlen_attention by %s on %s: %s; using the next backend", *key[:2], _failed[key])
