"""Linear layers by oneDNN: equal to torch's, with all derivatives, and only where they apply."""

from functools import cache

import pytest
import torch
from torch.nn import functional as F

from cat_fast import processor
from cat_fast.errors import UserError
from cat_fast.kernels.linear import op, rounding
from cat_fast.kernels.linear.layer import Linear
from cat_fast.kernels.linear.op import linear, resolve, selected, using
from cat_fast.kernels.linear.rounding import row_invariant_block
from tests.kernels.onednn import needs_onednn


def inputs(
    rows: tuple[int, ...], bias: bool, dtype: torch.dtype = torch.float32, outputs: int = 40
) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*rows, 24), (outputs, 24), (outputs,)]
    tensors = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    return [*tensors[:2], tensors[2] if bias else None]


@needs_onednn
@pytest.mark.parametrize("rows", [(1,), (7,), (64,), (3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_float64(rows, bias):
    x, weight, b = inputs(rows, bias)
    with using("onednn"):
        y = linear(x, weight, b)
        grads = torch.autograd.grad(y.square().sum(), [t for t in (x, weight, b) if t is not None])
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, b)]
    expected = F.linear(*exact)
    truth = torch.autograd.grad(expected.square().sum(), [t for t in exact if t is not None])
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    for found, one in zip(grads, truth, strict=True):
        torch.testing.assert_close(found.double(), one, rtol=1e-5, atol=1e-3)


@needs_onednn
@pytest.mark.parametrize("outputs", [1, 24, 40])
@pytest.mark.parametrize("layout", ["contiguous", "expanded", "transposed"])
def test_gradients_of_many_rows_are_those_of_float64_in_every_layout(monkeypatch, outputs, layout):
    calls, original = [], op._product
    monkeypatch.setattr(op, "_product", lambda *tensors: calls.append(1) or original(*tensors))
    rows = op._SMALLEST_CONVOLUTION // 24 + 1
    x, weight, bias = inputs((rows,), True, outputs=outputs)
    x = x.detach().t().contiguous().t() if layout == "transposed" else x.detach()
    with using("onednn"):
        y = linear(x, weight, bias)
    grad = {
        "contiguous": torch.randn(rows, outputs),
        "expanded": torch.randn(outputs).expand(rows, outputs),
        "transposed": torch.randn(outputs, rows).t(),
    }[layout]
    found = torch.autograd.grad(y, (weight, bias), grad)
    assert len(calls) == 1, "the gradient of the weight is a convolution's"
    exact = grad.double().t() @ x.double(), grad.double().sum(0)
    for one, truth in zip(found, exact, strict=True):
        assert (one.double() - truth).abs().max() < 1e-5 * truth.abs().max() + 1e-4


@needs_onednn
def test_the_selection_holds_within_its_block(monkeypatch):
    calls = []
    original = op._product
    monkeypatch.setattr(op, "_product", lambda *tensors: calls.append(1) or original(*tensors))
    layer, x = Linear(24, 40), torch.randn(5, 24)
    assert selected() == "mkl"
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with using("onednn"):
        assert selected() == "onednn"
        layer(x)
    assert selected() == "mkl"
    assert len(calls) == 1


@needs_onednn
def test_a_layer_may_have_its_own_library(monkeypatch):
    monkeypatch.setattr(op, "_product", lambda x, weight, bias: x.new_full((), 7))
    layer, x = Linear(24, 40), torch.randn(5, 24)
    layer.backend = "onednn"
    assert layer(x) == 7
    layer.backend = "mkl"
    with using("onednn"):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("vendor", "missing", "expected"),
    [("AuthenticAMD", None, "onednn"), ("GenuineIntel", None, "mkl"), ("AuthenticAMD", "no oneDNN", "mkl")],
)
def test_the_library_of_a_processor_needs_no_measurement(monkeypatch, tmp_path, vendor, missing, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: Test 9000\n\n")
    monkeypatch.setattr(processor, "CPUINFO", cpuinfo)
    monkeypatch.setattr(op, "unavailable_reason", lambda: missing)
    monkeypatch.setattr(op, "calibrate", lambda: pytest.fail("measured"))
    assert op.processor_backend.__wrapped__() == expected
    assert processor.processor_name() == "Test 9000"
    cpuinfo.unlink()
    monkeypatch.setattr(processor.platform, "processor", lambda: f"AMD64 Family 25, {vendor}")
    assert op.processor_backend.__wrapped__() == expected


@needs_onednn
def test_other_tensors_run_on_torchs_operator():
    with using("onednn"):
        for tensors in (
            inputs((5,), True, torch.float64),
            inputs((0,), True),
            inputs((5,), True, torch.bfloat16),
        ):
            assert torch.equal(linear(*tensors), F.linear(*tensors))
        x, weight, bias = inputs((5,), True)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight, bias).dtype == torch.bfloat16
        meta = [t.to("meta") for t in (x, weight, bias)]
        assert linear(*meta).shape == (5, 40)


@needs_onednn
def test_second_derivatives_and_transforms():
    x, weight, bias = inputs((5,), True)
    with using("onednn"):
        (first,) = torch.autograd.grad(linear(x, weight, bias).pow(3).sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(first.square().sum(), weight)
        jacobian = torch.func.jacrev(lambda row: linear(row, weight, bias))(x[0].detach())
    (first,) = torch.autograd.grad(F.linear(x, weight, bias).pow(3).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(jacobian, weight, rtol=0, atol=0)


@needs_onednn
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("rows", "size", "outputs"),
    [
        *((320, *shape) for shape in ((192, 576), (384, 384), (768, 192))),
        (64, 1152, 4608),  # the largest model's
        (64, 4608, 1152),
    ],
)
def test_rows_do_not_depend_on_the_others_in_blocks_of_sixteen(threads, rows, size, outputs):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), using("onednn"):
            x = torch.randn(rows, size, generator=generator)
            weight = torch.randn(outputs, size, generator=generator)
            expected = linear(x, weight)
            for kept in range(16, rows, 16):
                assert torch.equal(linear(x[-kept:], weight), expected[-kept:])
    finally:
        torch.set_num_threads(before)


def test_auto_takes_onednn_only_if_it_is_clearly_faster(monkeypatch):
    if op.unavailable_reason() is not None:
        assert resolve("auto") == "mkl"
        return
    for slower, expected in ((1.0, "mkl"), (2.0, "onednn")):
        now = [0.0]

        def clock(now=now, slower=slower):
            now[0] += slower if selected() == "mkl" else 1.0
            return now[0]

        monkeypatch.setattr(op.time, "perf_counter", clock)
        assert resolve("auto") == expected


def test_unknown_names_and_a_torch_without_onednn_are_refused(monkeypatch):
    with pytest.raises(UserError, match="linear_backend: expected auto, mkl, onednn, got 'blas'"):
        resolve("blas")
    monkeypatch.setattr(op, "unavailable_reason", lambda: "torch was built without oneDNN")
    assert resolve("auto") == "mkl"
    with pytest.raises(UserError, match="onednn is not available: torch was built without oneDNN; use mkl"):
        resolve("onednn")


@pytest.mark.parametrize("backend", ["mkl", pytest.param("onednn", marks=needs_onednn)])
def test_products_round_alike_in_some_block(backend):
    with torch.no_grad(), using(backend):
        block = row_invariant_block(torch.float32)
        assert block in (1, 8, 16, 32, 64)
        x, weight = torch.randn(8 * block, 384), torch.randn(100, 384)
        full = linear(x, weight)
        for rows in range(block, 8 * block, block):
            assert torch.equal(linear(x[:rows], weight), full[:rows])


def test_the_block_is_found_once_per_library_dtype_and_number_of_threads(monkeypatch):
    tried = []

    def sensitive(x, weight, backend):
        tried.append(backend)
        return F.linear(x, weight) + (1 if len(x) < 32 else 0)

    monkeypatch.setattr(rounding, "linear", sensitive)
    monkeypatch.setattr(rounding, "_block", cache(rounding._block.__wrapped__))
    assert row_invariant_block(torch.float32) == 32
    count = len(tried)
    assert set(tried) == {"mkl"}
    assert row_invariant_block(torch.float32) == 32
    assert len(tried) == count
    monkeypatch.setattr(rounding, "selected", lambda: "onednn")
    assert row_invariant_block(torch.float32) == 32
    assert set(tried) == {"mkl", "onednn"}
    monkeypatch.setattr(rounding, "linear", lambda x, weight, backend: F.linear(x, weight) + len(x))
    assert row_invariant_block(torch.bfloat16) is None
