"""CAT_FAST_CPU: the C++ kernels agree with their references on every instruction set of this CPU.

The environment is read once per process, so each case runs in its own process, which prints `report()`.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from cat_fast.kernels import library
from cat_fast.kernels.adaln.op import adaln, gate_residual_adaln
from cat_fast.kernels.adaln.reference import adaln_reference, gate_residual_adaln_reference
from cat_fast.kernels.group_norm_silu.op import group_norm_silu
from cat_fast.kernels.group_norm_silu.reference import group_norm_silu_reference
from cat_fast.kernels.pack.op import pack, unpack
from cat_fast.kernels.pack.reference import pack_reference, unpack_reference
from cat_fast.kernels.scalar_attention.op import scalar_attention
from cat_fast.kernels.scalar_attention.reference import scalar_attention_reference
from cat_fast.kernels.varlen_attention.op import varlen_attention
from cat_fast.kernels.varlen_attention.reference import varlen_attention_reference

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cat_fast._ops") is None, reason="the C++ operators are not built"
)
ROOT = Path(__file__).parents[2]
REPORT = "from tests.kernels.test_instruction_sets import report; report()"
NEEDED = {  # features, as listed by cat_fast._bindings
    "default": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512vl"},
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
LENGTHS = [33, 0, 70, 5]
GRIDS = [(4, 6), (3, 5)]


def cases():
    """Yield (name, operator, reference, shapes of its inputs); all inputs are differentiable."""
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    tokens, sequences = sum(LENGTHS), len(LENGTHS)
    packed = {"cu_seqlens": cu_seqlens}
    norm = {"groups": 4, "eps": 1e-6}
    yield "group_norm_silu", partial(group_norm_silu, **norm), partial(group_norm_silu_reference, **norm), [
        (2, 24, 9, 31), (24,), (24,)
    ]  # fmt: skip
    yield "scalar_attention", scalar_attention, scalar_attention_reference, [(2, 150, 19)] * 3
    for dim in (40, 72):
        yield (
            f"varlen_attention of {dim}",
            partial(varlen_attention, max_seqlen=max(LENGTHS), **packed),
            partial(varlen_attention_reference, **packed),
            [(tokens, 2, dim)] * 3,
        )
    rows = (sequences, 83)
    yield "adaln", partial(adaln, eps=1e-6, **packed), partial(adaln_reference, eps=1e-6, **packed), [
        (tokens, 83), rows, rows
    ]  # fmt: skip
    yield (
        "gate_residual_adaln",
        partial(gate_residual_adaln, eps=1e-6, **packed),
        partial(gate_residual_adaln_reference, eps=1e-6, **packed),
        [(tokens, 83), (tokens, 83), rows, rows, rows],
    )
    latents = [(9, 2 * h, 2 * w) for h, w in GRIDS]
    yield "pack", lambda *x: pack(x, 2), lambda *x: pack_reference(x, 2), latents
    tokens = [(sum(h * w for h, w in GRIDS), 36)]
    yield "unpack", lambda x: unpack(x, GRIDS, 2), lambda x: unpack_reference(x, GRIDS, 2), tokens


def outputs_and_gradients(function, inputs, dtype, memory_format):
    """Return the outputs, and the gradients of the inputs for seeded gradients of the outputs."""
    given = [
        x.to(dtype, memory_format=memory_format if x.dim() == 4 else torch.preserve_format).requires_grad_()
        for x in inputs
    ]
    outputs = function(*given)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator).to(dtype) for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, given, grads))


def report():
    """Print the instruction set in use, the cases that differ from their reference, and a digest."""
    wrong, digest = [], hashlib.sha256()
    for name, operator, reference, shapes in cases():
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(shape, generator=generator) for shape in shapes]
        for dtype, tolerance in TOLERANCE.items():
            rounded = [x.to(dtype) for x in inputs]
            for layout in (torch.contiguous_format, torch.channels_last):
                ours = outputs_and_gradients(operator, rounded, dtype, layout)
                truth = outputs_and_gradients(reference, rounded, torch.float64, layout)
                for got, want in zip(ours, truth, strict=True):
                    digest.update(got.float().contiguous().numpy().tobytes())
                    if not (got - want).abs().max() <= tolerance * want.abs().max():
                        wrong.append(f"{name} in {dtype}")
    print(json.dumps({"used": library.instruction_set(), "wrong": wrong, "digest": digest.hexdigest()}))


def python(code, cap):
    """Run `code` in a new process with CAT_FAST_CPU=cap, or without it."""
    environment = {name: value for name, value in os.environ.items() if name != "CAT_FAST_CPU"}
    environment |= {"CAT_FAST_BACKEND": "cpp"} | ({} if cap is None else {"CAT_FAST_CPU": cap})
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )


def supported():
    """Return the instruction sets of this CPU, in ascending order."""
    bindings = pytest.importorskip("cat_fast._bindings", reason="the C++ bindings are not built")
    features = {name for name, present in bindings.cpu_features().items() if present}
    return [name for name in library.INSTRUCTION_SETS if NEEDED[name] <= features]


@pytest.fixture(scope="module")
def reports():
    """Return the report for each value of CAT_FAST_CPU, with None for unset."""
    found = {}
    for cap in (None, *supported()):
        done = python(REPORT, cap)
        assert done.returncode == 0, done.stderr[-2000:]
        found[cap] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_requested_instruction_set_is_used_and_agrees_with_the_references(reports):
    for cap in supported():
        assert reports[cap]["used"] == cap
    assert {cap: found["wrong"] for cap, found in reports.items() if found["wrong"]} == {}


def test_the_default_is_the_best_instruction_set(reports):
    assert reports[None] == reports[supported()[-1]]


def test_kernels_run_on_the_requested_instruction_set(reports):
    """Fused multiply-add rounds differently, so different digests prove that the kernels differ."""
    if "avx2" not in reports:
        pytest.skip("this CPU has one instruction set")
    assert reports["avx2"]["digest"] != reports["default"]["digest"]


def test_an_unknown_instruction_set_is_refused():
    done = python("from cat_fast.kernels import backends; backends.report()", "sse9")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        "cat_fast.errors.UserError: CAT_FAST_CPU=sse9 is unknown: use one of default, avx2, avx512, "
        "or leave it unset"
    )


def test_an_instruction_set_that_the_library_cannot_use_is_refused():
    """Simulate a CPU without AVX2: the library has read the first value and keeps it."""
    code = """
import os
from cat_fast.kernels import library
assert library.instruction_set() == "default"
os.environ["CAT_FAST_CPU"] = "avx2"
library.load.cache_clear()
library.load("_ops")
"""
    done = python(code, "default")
    assert done.returncode != 0
    assert "UserError: CAT_FAST_CPU=avx2: this CPU supports at most default" in done.stderr.splitlines()[-1]


def test_an_unknown_instruction_set_is_one_line_on_the_command_line():
    done = python("from cat_fast.cli.main import main; import sys; sys.argv[1:] = ['info']; main()", "sse9")
    assert done.returncode == 2
    assert done.stderr.startswith("error: CAT_FAST_CPU=sse9 is unknown")
    assert len(done.stderr.splitlines()) <= 2  # as wide as the terminal allows
