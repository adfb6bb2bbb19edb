"""Event-timed operators in bf16 at the sizes of a paper model, against others, relative to the ceilings."""

import copy
import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.bounds.kernels import shapes
from benchmarks.gpu.blocks import OPERATORS, PASSES, RIVALS
from benchmarks.gpu.body import Context
from benchmarks.gpu.operators import SIZES, Call
from benchmarks.gpu.record import read_entries
from benchmarks.gpu.timing import Function, alternate, copies_needed, quartiles, ratio_of_medians
from cat_fast.hardware import run_device_type
from cat_fast.kernels import backends
from cat_fast.kernels.adaln.reference import adaln_reference, gate_residual_adaln_reference
from cat_fast.kernels.group_norm_silu.reference import group_norm_silu_reference
from cat_fast.kernels.pack.reference import pack_reference
from cat_fast.kernels.scalar_attention.reference import scalar_attention_reference

SECONDS = 1.2
"""Time per operator and pass."""
COMPILE_SECONDS = 20.0
"""torch.compile is left out where less time is left."""
RIVAL_BACKENDS = {"eager": "reference", "sdpa": "reference", "triton": "triton", "flash": "flash"}
"""Backends of ours that are the implementation of a rival, which is skipped where they run."""


def kernels(context: Context) -> None:
    """Record time, noise, share of the ceiling and speed-ups of every operator and pass."""
    device = torch.device(run_device_type())
    ceilings: dict[str, float] = {
        entry["name"]: entry["value"]
        for entry in read_entries(context.record.path)
        if entry["block"] == "ceilings" and entry["kind"] == "figure"
    }
    for op in OPERATORS:
        size, dtype = ("toy", torch.float32) if context.dry else ("chip", torch.bfloat16)
        first = SIZES[size][op](device, dtype)
        count = min(8, copies_needed(sum(x.nbytes for x in first.inputs), device))
        calls = [first, *(_copy(first) for _ in range(count - 1))]
        for name in PASSES:
            _time(context, op, name, calls, ceilings, device)
        del first, calls
        gc.collect()


def _copy(call: Call) -> Call:
    """Return the call on other memory; inputs keep their strides, views of one tensor stay views of one."""
    return replace(call, inputs=copy.deepcopy(call.inputs))


def _time(
    context: Context,
    op: str,
    name: str,
    calls: Sequence[Call],
    ceilings: Mapping[str, float],
    device: torch.device,
) -> None:
    contestants: dict[str, Sequence[Function]] = {
        "ours": [getattr(call, name) for call in calls],
        "again": [getattr(call, name) for call in calls],
    }
    contestants["ours"][0]()  # a backend that fails is replaced by the next one
    training = name == "forward_backward"
    backend = backends.choose(op, calls[0].inputs[0], training=training, **_sizes(op, calls[0]))
    for rival in RIVALS[op]:
        figure = f"{op}.{name}.vs_{rival}"
        if RIVAL_BACKENDS.get(rival) == backend:
            context.record.skipped(figure, f"ours runs on the backend {backend} itself")
            continue
        if rival == "compile" and (context.dry or context.left < COMPILE_SECONDS):
            context.record.skipped(figure, "no time was left to compile")
            continue
        try:
            function = _rival(op, rival, calls[0])
            made = [getattr(replace(call, function=function), name) for call in calls]
            made[0]()
            contestants[rival] = made
        except Exception as error:  # a kernel of another library that does not run here
            context.record.skipped(figure, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    times = alternate(contestants, SECONDS if not context.dry else 0.0, device)
    call, (low, seconds, high) = calls[0], quartiles([each.seconds for each in times["ours"]])
    details = {
        "low": 1e3 * low,
        "high": 1e3 * high,
        "backend": backend,
        "dtype": str(call.inputs[0].dtype).removeprefix("torch."),
        "shape": None if context.dry else shapes()[op],
    }
    context.record.figure(f"{op}.{name}.milliseconds", 1e3 * seconds, "ms", **details)
    host = quartiles([each.host for each in times["ours"]])[1]
    context.record.figure(f"{op}.{name}.host_milliseconds", 1e3 * host, "ms")
    context.record.figure(f"{op}.{name}.same_again", ratio_of_medians(times, "again", "ours"), "ratio")
    share = _share(call, name, seconds, ceilings)
    if share is None:
        context.record.skipped(f"{op}.{name}.of_ceiling", "the block ceilings has no figure")
    else:
        context.record.figure(f"{op}.{name}.of_ceiling", share, "ratio")
    for rival in RIVALS[op]:
        if rival in times:
            context.record.figure(f"{op}.{name}.vs_{rival}", ratio_of_medians(times, rival, "ours"), "ratio")


def _share(call: Call, name: str, seconds: float, ceilings: Mapping[str, float]) -> float | None:
    if name in call.bytes_moved and ceilings.get("copy_bandwidth"):
        return call.bytes_moved[name] / seconds / ceilings["copy_bandwidth"]
    if name in call.flops and ceilings.get("matmul_bfloat16"):
        return call.flops[name] / seconds / ceilings["matmul_bfloat16"]
    return None


def _sizes(op: str, call: Call) -> dict[str, int]:
    return {"head_dim": call.inputs[0].shape[-1]} if op in ("varlen_attention", "wide_attention") else {}


def _rival(op: str, rival: str, call: Call) -> Callable[..., Any]:
    """Return another implementation with the arguments of the call's function."""
    ours: Any = call.function
    if op == "pack":
        return lambda last, *others: pack_reference([*others, last], 2)
    options = dict(ours.keywords) if isinstance(ours, partial) else {}
    if rival == "triton":
        return _forced(f"{op}=triton", ours)
    if op == "varlen_attention":
        return _attention(rival, options)
    references: dict[str, Callable[..., Any]] = {
        "group_norm_silu": group_norm_silu_reference,
        "adaln": adaln_reference,
        "gate_residual_adaln": gate_residual_adaln_reference,
        "scalar_attention": scalar_attention_reference,
    }
    eager = partial(references[op], **options)
    if rival != "compile":
        return eager
    torch.compiler.reset()  # earlier compilations, also of other operators, count towards a limit
    return torch.compile(eager, dynamic=False)


def _attention(rival: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    cu_seqlens, longest = options["cu_seqlens"], options["max_seqlen"]
    if rival == "flash":
        from cat_fast.kernels.varlen_attention.external import flash_varlen

        return lambda q, k, v: flash_varlen(q, k, v, cu_seqlens, longest, cu_seqlens, longest)
    if rival == "cudnn":
        from torch.nn.attention import varlen

        runs_cudnn = getattr(varlen, "_should_use_cudnn", None)
        if runs_cudnn is None or not runs_cudnn(cu_seqlens.device.index):
            raise RuntimeError("torch.nn.attention.varlen runs FlashAttention here, not cuDNN")
        return lambda q, k, v: varlen.varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
    bounds = list(pairwise(cu_seqlens.tolist()))

    def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        def pad(x: torch.Tensor) -> torch.Tensor:  # (T, H, D) -> (S, H, L, D)
            rows = [x[begin:end] for begin, end in bounds]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2)

        lengths = cu_seqlens.diff()
        mask = (torch.arange(longest, device=q.device) < lengths[:, None])[:, None, None]
        y = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), attn_mask=mask).transpose(1, 2)
        return torch.cat([y[s, : end - begin] for s, (begin, end) in enumerate(bounds)])

    return padded


def _forced(setting: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs on a forced backend."""

    def run(*arguments: Any) -> Any:
        with _environment("CAT_FAST_BACKEND", setting):
            return function(*arguments)

    return run


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
