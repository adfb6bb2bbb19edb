"""Operators in the GPU check: inputs, rivals, timing on a simulated clock, compute-sanitizer."""

import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention

from benchmarks.gpu import kernels, sanitizer, timing
from benchmarks.gpu.blocks import CUDA_OPERATORS, OPERATORS, PASSES, RIVALS, TOOLS
from benchmarks.gpu.body import Context
from benchmarks.gpu.operators import SIZES
from benchmarks.gpu.record import RESULTS, Recorder, read_entries
from cat_fast.kernels import backends

CPU = torch.device("cpu")
COMPILED = [op for op in OPERATORS if "compile" in RIVALS[op]]
PAIRS = [(op, rival) for op in OPERATORS for rival in RIVALS[op]]


def toy(op):
    return SIZES["toy"][op](CPU, torch.float32)


@pytest.fixture
def context(tmp_path):
    """Arguments of a block that measures, with plenty of time."""
    record, deadline = Recorder(tmp_path / RESULTS, "kernels", False), time.monotonic() + 600
    return Context(record=record, dry=False, work=tmp_path, wheels=None, deadline=deadline)


@pytest.fixture
def clock(monkeypatch):
    """The clock of `timing`, moved by the tests."""
    clock = SimpleNamespace(now=0.0)
    now = SimpleNamespace(perf_counter=lambda: clock.now, monotonic=lambda: clock.now)
    monkeypatch.setattr(timing, "time", now)
    return clock


@pytest.mark.parametrize("op", OPERATORS)
def test_copies_have_the_strides_of_their_inputs(op):
    call = toy(op)
    copied = kernels._copy(call)
    for ours, theirs in zip(call.inputs, copied.inputs, strict=True):
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours, theirs)
        assert ours.untyped_storage().data_ptr() != theirs.untyped_storage().data_ptr()
    for one, other in pairwise(range(len(call.inputs))):
        shared = [
            made.inputs[one].untyped_storage().data_ptr() == made.inputs[other].untyped_storage().data_ptr()
            for made in (call, copied)
        ]
        assert shared[0] == shared[1]


def test_first_calls_are_not_timed_and_all_inputs_take_turns(clock):
    """Each of four functions compiles for 10 s at its first call; a call then takes 2 ms."""
    called = [0] * 4

    def call(number):
        clock.now += 2e-3 if called[number] else 10.0
        called[number] += 1

    functions = [lambda number=number: call(number) for number in range(4)]
    found = timing.alternate({"ours": functions}, 0.0, CPU)["ours"]
    assert [each.seconds for each in found] == pytest.approx([2e-3, 2e-3])  # two rounds
    assert sum(called) == 4 + 3 + 2 * 3  # first calls, an estimate from three, rounds of 5 ms
    assert min(called) >= 3


class SimulatedGpu:
    """A stream whose kernels start once they are launched and those before them have ended."""

    def __init__(self, clock, host):
        self.clock, self.host, self.idle_at = clock, host, 0.0

    def launch(self):
        """Launch a kernel of 20 µs."""
        self.clock.now += self.host
        self.run(20e-6)

    def run(self, seconds):
        self.idle_at = max(self.idle_at, self.clock.now) + seconds

    def sleep(self, cycles):
        self.run(cycles / 2e9)

    def event(self, enable_timing):
        """Return an event; its record has the time at which the stream reaches it."""
        event = SimpleNamespace(at=None)

        def record():
            event.at = max(self.idle_at, self.clock.now)

        def synchronize():
            self.clock.now = max(self.clock.now, event.at)

        event.record, event.synchronize = record, synchronize
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


@pytest.mark.parametrize("host", [50e-6, 3e-3])
def test_kernels_shorter_than_their_launch_are_timed_by_the_device(clock, monkeypatch, host):
    gpu = SimulatedGpu(clock, host)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    contestants = {"ours": [gpu.launch] * 3}
    for queue, seconds in ((True, 20e-6), (False, host)):
        found = timing.alternate(contestants, 0.0, torch.device("cuda"), queue=queue)["ours"]
        assert [each.seconds for each in found] == pytest.approx([seconds] * 2, rel=0.02)
        assert [each.host for each in found] == pytest.approx([host] * 2)


@pytest.mark.parametrize("op", COMPILED)
def test_a_rival_is_compiled_once_for_all_inputs(op, context, monkeypatch):
    """Every compilation counts towards dynamo's limit, past which a function runs without compilation."""
    done = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: done.append("compile") or function)
    monkeypatch.setattr(kernels, "SECONDS", 0.0)
    calls = [toy(op), kernels._copy(toy(op)), kernels._copy(toy(op))]
    for name in PASSES:
        kernels._time(context, op, name, calls, {}, CPU)
    assert done == ["reset", "compile"] * len(PASSES)
    figures = {entry["name"] for entry in read_entries(context.record.path) if entry["kind"] == "figure"}
    assert {f"{op}.{name}.vs_compile" for name in PASSES} <= figures


@pytest.mark.parametrize(("op", "rival"), PAIRS)
def test_a_gpu_runs_another_implementation_than_the_rival(op, rival):
    """At least one backend that a GPU chooses unforced is not the rival."""
    chosen = [
        backend.name
        for backend in backends.TABLE
        if backend.op == op and backend.device in (None, "cuda") and backend.only_forced is None
    ]
    assert set(chosen) - {kernels.RIVAL_BACKENDS.get(rival)}


@pytest.mark.parametrize(("op", "rival"), [pair for pair in PAIRS if pair[1] in kernels.RIVAL_BACKENDS])
def test_ours_is_not_timed_against_itself(op, rival, context, monkeypatch):
    monkeypatch.setattr(kernels, "RIVALS", {op: (rival,)})
    monkeypatch.setattr(kernels, "SECONDS", 0.0)
    monkeypatch.setattr(backends, "choose", lambda op, x, **_: "reference")
    monkeypatch.setitem(kernels.RIVAL_BACKENDS, rival, "reference")
    kernels._time(context, op, "forward", [toy(op)], {}, CPU)
    (found,) = [e for e in read_entries(context.record.path) if e["name"] == f"{op}.forward.vs_{rival}"]
    assert found["reason"] == "ours runs on the backend reference itself"


@pytest.mark.skipif(not backends.triton_is_interpreted(), reason="needs Triton's interpreter")
def test_wide_attention_is_timed_against_our_kernel(monkeypatch):
    """SDPA runs by default, since the kernel is not yet measured."""
    chosen, first_that_accepts = [], backends._first_that_accepts

    def choose(*arguments):
        chosen.append(first_that_accepts(*arguments))
        return chosen[-1]

    monkeypatch.setattr(backends, "_first_that_accepts", choose)
    call = toy("wide_attention")
    rival = replace(call, function=kernels._rival("wide_attention", "triton", call))
    for ours, theirs in zip(call.forward(), rival.forward(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert chosen == ["reference", "triton"]


@pytest.mark.parametrize("check", [None, False, True])
def test_cudnn_is_timed_only_where_torch_runs_it(monkeypatch, check):
    """Elsewhere the same public function runs FlashAttention."""
    varlen = SimpleNamespace(varlen_attn=lambda q, k, v, *_: v)
    if check is not None:
        varlen._should_use_cudnn = lambda index: check
    monkeypatch.setattr(torch.nn.attention, "varlen", varlen, raising=False)
    call = toy("varlen_attention")
    if not check:
        with pytest.raises(RuntimeError, match="runs FlashAttention here, not cuDNN"):
            kernels._rival("varlen_attention", "cudnn", call)
    else:
        assert kernels._rival("varlen_attention", "cudnn", call)(*call.inputs) is call.inputs[2]


def test_the_tool_sees_every_tensor_as_an_allocation(context, monkeypatch):
    """Within the blocks of torch's caching allocator, reads out of bounds would not be errors."""
    environments = []

    def run(command, *, env, **options):
        environments.append(env)
        return subprocess.CompletedProcess(command, 0, "ERROR SUMMARY: 0 errors", "")

    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: sys.executable)
    monkeypatch.setattr(sanitizer.subprocess, "run", run)
    sanitizer.sanitizer(context)
    assert [env["PYTORCH_NO_CUDA_MEMORY_CACHING"] for env in environments] == ["1"] * len(TOOLS)
    assert all(f"{op}=cuda" in env["CAT_FAST_BACKEND"] for op in CUDA_OPERATORS for env in environments)
    assert [entry["value"] for entry in read_entries(context.record.path)] == [0] * len(TOOLS)


def test_no_tile_divides_the_inputs(monkeypatch):
    monkeypatch.setattr(sanitizer, "SIZES", {"odd": SIZES["odd"]})
    for op in CUDA_OPERATORS:
        sanitizer.call(op)
