"""varlen_attention through FlashAttention and xformers: arguments, choice, and on a GPU results."""

import dataclasses
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from cat_fast.kernels import backends
from cat_fast.kernels.varlen_attention import external, op
from cat_fast.kernels.varlen_attention.reference import varlen_attention_reference

FUNCTIONS = {
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
    ours = external.block_diagonal_mask(cu_seqlens, max(lengths), cu_seqlens, max(lengths))
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
def test_zero_tokens(name):
    function, _ = FUNCTIONS[name]
    leaves = [torch.empty(0, 2, 72, requires_grad=True) for _ in range(3)]
    out = function(*leaves, offsets([0, 0]), 0, offsets([0, 0]), 0)
    assert out.shape == (0, 2, 72)
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), leaves)] == [(0, 2, 72)] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_a_gpu_the_reason_is_reported(name):
    _, unavailable_reason = FUNCTIONS[name]
    assert unavailable_reason(torch.device("cuda", 0), torch.bfloat16, 72) == "no CUDA device"


SCHEMA = (
    "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, "
    "Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, "
    "*, float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None, "
    "Tensor? seqused_k=None, Tensor? alibi_slopes=None{more}) -> (Tensor output, Tensor softmax_logsumexp, "
    "Tensor rng_state, Tensor unused, Tensor debug_attn_mask)"
)
BACKWARD = (
    "aten::_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)"
)
ADDED = {
    "2.10": "",
    "2.14": ", Tensor? block_table=None, int? num_splits=None",
}


@pytest.mark.parametrize("version", ADDED)
def test_schemas_of_supported_versions_match(version):
    forward, backward = SCHEMA.format(more=ADDED[version]), BACKWARD
    assert external.schema_reason(torch._C.parse_schema(forward), torch._C.parse_schema(backward)) is None


def test_the_installed_schema_is_among_them():
    operators = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
    installed = {str(operator.default._schema) for operator in operators}
    assert installed <= {*(SCHEMA.format(more=more) for more in ADDED.values()), BACKWARD}


@pytest.mark.parametrize(
    ("forward", "backward", "reason"),
    [
        (SCHEMA.format(more=", int chunks"), BACKWARD, "needs chunks"),
        (SCHEMA.format(more="").replace("SymInt max_q, ", ""), BACKWARD, "unknown arguments of .*_forward"),
        (SCHEMA.format(more=""), BACKWARD.replace("Tensor out, ", ""), "unknown arguments of .*_backward"),
    ],
)
def test_other_schemas_are_not_called(forward, backward, reason):
    found = external.schema_reason(torch._C.parse_schema(forward), torch._C.parse_schema(backward))
    assert re.search(reason, found)


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
    assert chosen(1) == chosen(1, training=False) == "flash"
    assert set(hopper) == {(torch.device("cuda", 1), torch.bfloat16, 72)}
    assert chosen(head_dim=63) == "reference"


def test_a_failed_call_falls_through_once_with_a_reason(hopper, caplog):
    q = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(9, 2, 72))
    for number, (name, following) in enumerate(
        (("flash", "torch"), ("torch", "xformers"), ("xformers", "triton"))
    ):
        assert chosen() == name
        external.set_failed(name, q, (IndexError, ValueError, AssertionError)[number]("no kernel"))
        assert chosen() == following
    assert chosen(1) == "flash"
    assert caplog.text.count("it failed here: no kernel; using the next backend") == 3


def test_only_kernels_with_deterministic_gradients_train_deterministically(hopper):
    q = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(9, 2, 72))
    for name in ("flash", "torch"):
        external.set_failed(name, q, ValueError("no kernel"))
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
        results.append((out, *torch.autograd.grad(out.sum() + out.square().sum(), leaf)))
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
