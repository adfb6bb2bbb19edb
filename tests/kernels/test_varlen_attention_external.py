"""varlen_attention through FlashAttention and xformers: arguments, choice, and on a GPU results."""

import dataclasses
import importlib.machinery
import json
import re
import subprocess
import sys
import types
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cat_fast.kernels import backends, cuda_coverage
from cat_fast.kernels.varlen_attention import external, op
from cat_fast.kernels.varlen_attention.reference import varlen_attention_reference

TABLE = backends.TABLE
FUNCTIONS = {
    "flash3": (external.flash3_varlen, external.flash3_unavailable_reason),
    "flash": (external.flash_varlen, external.flash_unavailable_reason),
    "torch": (external.torch_varlen, external.torch_unavailable_reason),
    "xformers": (external.xformers_varlen, external.xformers_unavailable_reason),
}


def offsets(lengths, device="cpu"):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


@pytest.mark.parametrize("lengths", [[5], [4, 9, 9, 2], [3, 0, 1]], ids=str)
def test_the_mask_for_xformers_is_the_one_it_would_build_from_lengths_on_the_host(lengths):
    attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    cu_seqlens, tokens = offsets(lengths), sum(lengths)
    ours = external.block_diagonal_mask(cu_seqlens, cu_seqlens, max(lengths), max(lengths))
    theirs = attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=torch.device("cpu"))
    for ours_info, theirs_info in ((ours.q_seqinfo, theirs.q_seqinfo), (ours.k_seqinfo, theirs.k_seqinfo)):
        assert torch.equal(ours_info.seqstart, theirs_info.seqstart)
        assert ours_info.max_seqlen == theirs_info.max_seqlen
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = sequence[:, None] == sequence
    assert torch.equal(ours.materialize((tokens, tokens)) == 0, allowed)
    assert torch.equal(ours.materialize((tokens, tokens)), theirs.materialize((tokens, tokens)))


@pytest.mark.parametrize("function", [external.flash_varlen, external.torch_varlen])
def test_the_operator_of_torch_accepts_our_arguments_and_differentiates(function):
    """Run on meta tensors: torch's checks and shapes without a kernel."""
    qkv = torch.empty(9, 3, 2, 72, dtype=torch.bfloat16, device="meta", requires_grad=True)
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
    out = function(*qkv.unbind(1), cu_seqlens, 5, cu_seqlens, 5)
    assert (out.shape, out.dtype) == ((9, 2, 72), torch.bfloat16)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert grad.shape == qkv.shape


@pytest.mark.parametrize("name", FUNCTIONS)
def test_zero_tokens(name, flash_attn_3):
    function, _ = FUNCTIONS[name]
    leaves = [torch.empty(0, 2, 72, requires_grad=True) for _ in range(3)]
    out = function(*leaves, offsets([0, 0]), 0, offsets([0, 0]), 0)
    assert out.shape == (0, 2, 72)
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), leaves)] == [(0, 2, 72)] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_a_gpu_the_reason_is_reported(name):
    _, unavailable_reason = FUNCTIONS[name]
    reason = unavailable_reason(torch.device("cuda", 0), torch.bfloat16, 72)
    assert reason in ("no CUDA device", "flash_attn_interface is not installed")


SCHEMAS = json.loads((Path(__file__).parent / "flash_schemas.json").read_text())
"""Schemas of aten's forward and backward operator, by version of torch; from native_functions.yaml."""


def parse(schema):
    return torch._C.parse_schema(f"aten::{schema}")


@pytest.mark.parametrize("version", SCHEMAS)
def test_schemas_of_supported_versions_match(version):
    assert external.schema_reason(*map(parse, SCHEMAS[version])) is None


def test_the_installed_schema_is_that_of_its_version():
    version = ".".join(torch.__version__.split(".")[:2])
    if version not in SCHEMAS:
        pytest.skip(f"no schemas of torch {version} are recorded")
    operators = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
    installed = [str(operator.default._schema) for operator in operators]
    assert installed == [str(parse(schema)) for schema in SCHEMAS[version]]


FORWARD, BACKWARD = SCHEMAS["2.14"]


@pytest.mark.parametrize(
    ("forward", "backward", "reason"),
    [
        (FORWARD.replace("int? num_splits=None", "int chunks"), BACKWARD, "needs chunks"),
        (FORWARD.replace("SymInt max_q, ", ""), BACKWARD, "unknown arguments of .*_forward"),
        (FORWARD, BACKWARD.replace("Tensor out, ", ""), "unknown arguments of .*_backward"),
    ],
)
def test_other_schemas_are_not_called(forward, backward, reason):
    assert re.search(reason, external.schema_reason(parse(forward), parse(backward)))


def test_an_unknown_schema_falls_through_to_triton(hopper, monkeypatch):
    """Each row's own check runs, on a simulated GPU without other libraries."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(external.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(external, "schema_reason", lambda forward, backward: "unknown arguments")
    table = [
        dataclasses.replace(row, probe=row.probe.__wrapped__) if row.probe else row for row in TABLE
    ]  # without their caches
    monkeypatch.setattr(backends, "TABLE", tuple(table))
    assert chosen() == "triton"


@pytest.fixture
def flash_attn_3(monkeypatch):
    """A package flash_attn_interface that computes the reference, on a simulated Hopper GPU.

    Returns the calls' arguments, and a function that probes without a cache.
    """
    calls, scale = [], [1.0]

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, deterministic=False):
        calls.append((max_q, max_k, deterministic))
        return scale[0] * varlen_attention_reference(q, k, v, cu_q, cu_k)

    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setattr(torch.ops, "flash_attn_3", SimpleNamespace(_flash_attn_forward=1), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capability = [(9, 0)]
    monkeypatch.setattr(cuda_coverage, "capability_of", lambda index: capability[0])
    probe = external.flash3_unavailable_reason.__wrapped__
    return SimpleNamespace(
        calls=calls,
        scale=scale,
        capability=capability,
        reason=lambda: probe(torch.device("cpu"), torch.bfloat16, 72),
    )


def test_flash_attention_3_runs_on_hopper_only(flash_attn_3):
    assert flash_attn_3.reason() is None
    assert flash_attn_3.calls == [(200, 200, False)]
    flash_attn_3.capability[0] = (8, 0)
    assert flash_attn_3.reason() == "expected compute capability 9.0, got 8.0"


def test_flash_attention_3_that_torch_compile_cannot_trace_is_not_used(flash_attn_3, monkeypatch):
    monkeypatch.setattr(torch.ops, "flash_attn_3", SimpleNamespace())
    assert "does not work with torch.compile" in flash_attn_3.reason()


def test_a_probe_with_wrong_values_counts_as_failed(flash_attn_3, caplog):
    flash_attn_3.scale[0] = 1.2
    assert flash_attn_3.reason() == "its result differs from the reference by 0.2 of the largest value"
    assert caplog.text.count("varlen_attention by flash3_varlen") == 1
    flash_attn_3.scale[0] = float("nan")
    assert "differs" in flash_attn_3.reason()


def test_wrong_gradients_count_as_failed():
    def wrong(q, k, v, cu_q, max_q, cu_k, max_k):
        y = varlen_attention_reference(q, k, v, cu_q, cu_k)
        return y.detach() + 2 * (y - y.detach())

    arguments = torch.device("cpu"), torch.float16, 64
    assert "its gradient differs" in external._probe_error(wrong, *arguments)
    assert external._probe_error(wrong, *arguments, backward=False) is None


def test_flash_attention_3_differentiates_and_honours_determinism(flash_attn_3):
    x = torch.randn(9, 2, 72, requires_grad=True)
    cu_seqlens = offsets([4, 5])
    torch.use_deterministic_algorithms(True)
    try:
        out = external.flash3_varlen(x, x, x, cu_seqlens, 5, cu_seqlens, 5)
    finally:
        torch.use_deterministic_algorithms(False)
    assert flash_attn_3.calls == [(5, 5, True)]
    expected = varlen_attention_reference(x, x, x, cu_seqlens)
    for ours, truth in zip(
        (out, *torch.autograd.grad(out.sum(), x)),
        (expected, *torch.autograd.grad(expected.sum(), x)),
        strict=True,
    ):
        assert torch.equal(ours, truth)


class OnceDifferentiable(torch.autograd.Function):
    """Attention whose gradients cannot be differentiated, as those of fused kernels."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens):
        ctx.save_for_backward(q, k, v, cu_seqlens)
        return varlen_attention_reference(q, k, v, cu_seqlens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *qkv, cu_seqlens = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in qkv]
            out = varlen_attention_reference(*leaves, cu_seqlens)
        return *torch.autograd.grad(out, leaves, grad), None


def test_xformers_has_derivatives_beyond_gradients(monkeypatch):
    xformers = types.ModuleType("xformers.ops")
    xformers.memory_efficient_attention = lambda q, k, v, attn_bias: OnceDifferentiable.apply(
        q[0], k[0], v[0], attn_bias
    )[None]
    monkeypatch.setitem(sys.modules, "xformers.ops", xformers)
    monkeypatch.setattr(external, "block_diagonal_mask", lambda cu_seqlens, *_: cu_seqlens)
    x = torch.randn(9, 2, 8, dtype=torch.float64, requires_grad=True)
    cu_seqlens = offsets([4, 5])

    def attention(x):
        return external.xformers_varlen(x, x, x, cu_seqlens, 5, cu_seqlens, 5)

    assert torch.autograd.gradcheck(attention, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(attention, x, fast_mode=True)


@pytest.fixture
def hopper(monkeypatch):
    """Simulate a GPU where every backend is available and every probe succeeds."""
    monkeypatch.delenv("CAT_FAST_BACKEND", raising=False)
    monkeypatch.setattr(backends.Backend, "unavailable_reason", lambda self: None)
    monkeypatch.setattr(external, "_failed", {})
    asked = []

    def probe(device, dtype, head_dim):
        asked.append((device, dtype, head_dim))

    table = [
        dataclasses.replace(row, probe=probe) if row.probe is not None else row for row in backends.TABLE
    ]
    monkeypatch.setattr(backends, "TABLE", tuple(table))
    return asked


def chosen(index=0, training=True, head_dim=72):
    device, sizes = torch.device("cuda", index), (("head_dim", head_dim),)
    return backends._choose("varlen_attention", device, torch.bfloat16, training, sizes)


def test_flash_attention_trains_and_is_probed_where_the_tensors_are(hopper):
    assert chosen(1) == chosen(1, training=False) == "flash3"
    assert set(hopper) == {(torch.device("cuda", 1), torch.bfloat16, 72)}
    assert chosen(head_dim=63) == "reference"


def fail(*names):
    q = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(9, 2, 72))
    for number, name in enumerate(names):
        external.set_failed(name, q, (IndexError, ValueError, AssertionError)[number % 3]("no kernel"))


def test_a_failed_call_falls_through_once_with_a_reason(hopper, caplog):
    for name, following in pairwise(("flash3", "flash", "xformers", "triton")):
        assert chosen() == name
        fail(name)
        assert chosen() == following
    assert chosen(1) == "flash3"
    assert caplog.text.count("it failed here: no kernel; using the next backend") == 3


def test_the_public_function_of_torch_does_not_train(hopper):
    """Its backward pass would run cuDNN on the statistics of FlashAttention."""
    fail("flash3", "flash")
    assert (chosen(training=False), chosen()) == ("torch", "xformers")


def test_only_kernels_with_deterministic_gradients_train_deterministically(hopper):
    fail("flash3", "flash", "torch")
    assert chosen() == "xformers"
    torch.use_deterministic_algorithms(True)
    try:
        assert (chosen(), chosen(training=False)) == ("triton", "xformers")
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_operator_runs_the_next_backend_after_a_failure(hopper, monkeypatch):
    """The call itself succeeds: the failure costs one message."""
    calls = []

    def fails(*arguments):
        calls.append(1)
        raise IndexError("no plan")

    monkeypatch.setitem(op.EXTERNAL, "flash", fails)
    names = iter(["flash", "reference", "reference"])
    monkeypatch.setattr(backends, "choose", lambda *a, **k: next(names))
    q = torch.randn(5, 1, 32)
    for _ in range(2):
        y = op.varlen_attention(q, q, q, offsets([2, 3]), 3)
    assert torch.allclose(y, varlen_attention_reference(q, q, q, offsets([2, 3])))
    assert len(calls) == 1


def test_importing_the_module_does_not_import_xformers():
    code = "import sys, cat_fast.kernels.varlen_attention.external; print('xformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_on_a_gpu_values_and_gradients_match_float64(name, dtype):
    function, unavailable_reason = FUNCTIONS[name]
    if (reason := unavailable_reason(torch.device("cuda", 0), dtype, 72)) is not None:
        pytest.skip(f"varlen_attention by {name}: {reason}")
    torch.manual_seed(0)
    lengths = [64, 1, 256, 63]
    qkv = torch.randn(sum(lengths), 3, 4, 72, device="cuda").to(dtype)
    cu_seqlens = offsets(lengths, "cuda")
    results = []
    for leaf, run in (
        (qkv.clone().requires_grad_(), lambda *x: function(*x, *(cu_seqlens, max(lengths)) * 2)),
        (qkv.double().requires_grad_(), lambda *x: varlen_attention_reference(*x, cu_seqlens)),
    ):
        out = run(*leaf.unbind(1))
        trains = name != "torch"
        gradients = torch.autograd.grad(out.sum() + out.square().sum(), leaf) if trains else ()
        results.append((out, *gradients))
    for ours, truth in zip(*results, strict=True):
        assert (ours.double() - truth).abs().max() <= 1e-2 * truth.abs().max()


@pytest.mark.parametrize("wanted", [True, False])
def test_flash_attention_is_strict_about_determinism_only_if_it_is_on(wanted, monkeypatch):
    """Under warn_only, which a run sets, aten's kernel would vary and warn."""
    seen = []

    class Backward:
        def __call__(self, grad, q, k, v, *_):
            seen.append(
                torch.are_deterministic_algorithms_enabled()
                and not torch.is_deterministic_algorithms_warn_only_enabled()
            )
            return q, k, v

    qkv = torch.empty(9, 3, 2, 72, dtype=torch.bfloat16, device="meta", requires_grad=True)
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    try:
        out = external.flash_varlen(*qkv.unbind(1), cu_seqlens, 5, cu_seqlens, 5)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", Backward())
        torch.autograd.grad(out.sum(), qkv)
        assert seen == [wanted]
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
