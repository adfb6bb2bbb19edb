"""scalar_attention's Triton kernels against the formula in float64, interpreted where there is no GPU."""

import pytest
import torch

from cat_fast.kernels import backends
from cat_fast.kernels.scalar_attention.op import scalar_attention

pytestmark = [
    pytest.mark.skipif(
        backends.triton_obstacle() is not None, reason=f"Triton: {backends.triton_obstacle()}"
    ),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # at places that are masked out
]
if backends.triton_obstacle() is None:
    from cat_fast.kernels.scalar_attention.triton import (
        scalar_attention_backward_triton,
        scalar_attention_triton,
    )
    from cat_fast.kernels.scalar_attention.triton_sums import AT_KEYS, AT_QUERIES, COUNT, parameters_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def inputs(shape, *, deviation=1.0, dtype=torch.float32):
    """q, k, v and the gradient at y."""
    q, k, v, grad = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    return [t.to(DEVICE, dtype) for t in (q * deviation, k * deviation, v, grad)]


def formula(q, k, v):
    weights = torch.einsum("bih,bjh->bhij", q, k).softmax(-1)
    return torch.einsum("bhij,bjh->bih", weights, v)


def triton_results(q, k, v, grad):
    """y, dq, dk, dv."""
    return scalar_attention_triton(q, k, v), *scalar_attention_backward_triton(grad, q, k, v)


def blocks_of(q, k, v):
    """How many blocks each head has for sums at queries and for those at keys; 0 is none."""
    parameters = parameters_of(q, k, v)
    return [parameters[:, at.value + COUNT.value] for at in (AT_QUERIES, AT_KEYS)]


def assert_matches_float64(tensors):
    leaves = [t.double().requires_grad_() for t in tensors[:3]]
    y = formula(*leaves)
    want = (y.detach(), *torch.autograd.grad(y, leaves, tensors[3].double()))
    for name, ours, truth in zip(("y", "dq", "dk", "dv"), triton_results(*tensors), want, strict=True):
        assert ours.dtype == tensors[0].dtype
        assert ours.is_contiguous()
        # Gradients of saturated or constant weights are zero but for rounding.
        error = (ours.double() - truth).abs().max() / truth.abs().max().clamp(min=0.1)
        assert error <= TOLERANCE[ours.dtype], f"{name}: {error:.1e}"


# One position, few, odd numbers; part of a tile of heads, more than one, aligned and not; several splits.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 1, 3), torch.float32),
        ((1, 63, 1), torch.float32),
        ((1, 150, 24), torch.float32),
        ((2, 100, 5), torch.bfloat16),
        ((2, 100, 5), torch.float16),
    ],
    ids=str,
)
def test_value_and_gradients_match_float64(shape, dtype):
    assert_matches_float64(inputs(shape, dtype=dtype))


@pytest.mark.parametrize("deviation", [0.3, 1.0, 1.5])
def test_tables_of_few_and_of_many_blocks_are_right(deviation):
    tensors = inputs((1, 300, 4), deviation=deviation)
    for blocks in blocks_of(*tensors[:3]):
        assert (blocks >= max(1.0, 6.0 * deviation**2)).all()
    assert_matches_float64(tensors)


def test_heads_past_the_largest_table_are_summed_term_by_term():
    tensors = inputs((1, 200, 4), deviation=0.5)
    tensors[0][:, :, 1] *= 100
    for blocks in blocks_of(*tensors[:3]):
        assert (blocks == 0).tolist() == [[False, True, False, False]]
    assert_matches_float64(tensors)
    alone = triton_results(*(t[:, :, 2:3] for t in tensors))
    for ours, truth in zip(triton_results(*tensors), alone, strict=True):
        assert torch.equal(ours[:, :, 2:3], truth)


def test_thousands_of_positions_are_summed_as_exactly():
    assert_matches_float64(inputs((1, 1000, 1)))


@pytest.mark.parametrize(("tensor", "offset"), [(0, 20.0), (1, -1000.0), (2, 100.0)], ids=["q", "k", "v"])
def test_queries_keys_and_values_may_lie_far_from_zero(tensor, offset):
    tensors = inputs((1, 200, 3), deviation=0.5)
    tensors[tensor] += offset
    assert_matches_float64(tensors)


def test_exponents_far_beyond_the_range_of_floats_neither_overflow_nor_vanish():
    tensors = inputs((1, 100, 2), deviation=30.0)
    assert (tensors[0].amax() * tensors[1].amax()).exp().isinf()
    y = scalar_attention_triton(*tensors[:3])
    assert (y - formula(*(t.double() for t in tensors[:3]))).abs().max() <= 1e-4


@pytest.mark.parametrize("tensor", [0, 1, 2], ids=["q", "k", "v"])
def test_a_range_of_zero_is_no_special_case(tensor):
    tensors = inputs((1, 70, 3))
    tensors[tensor].fill_(0.75)
    assert_matches_float64(tensors)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("tensor", [0, 1, 2, 3], ids=["q", "k", "v", "grad"])
def test_a_value_that_is_not_finite_is_not_hidden_and_stays_in_its_head(tensor, value):
    tensors = inputs((2, 40, 3))
    tensors[tensor][1, 7, 2] = value
    for result in triton_results(*tensors)[tensor // 3 :]:  # y has no gradient among its inputs
        assert result[1, :, 2].isnan().all()
        assert result[0].isfinite().all()
        assert result[1, :, :2].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty_input_gives_empty_output_and_gradients(shape):
    assert all(result.shape == shape for result in triton_results(*inputs(shape)))


def test_inputs_and_gradients_may_be_views_in_another_memory_order():
    tensors = inputs((1, 40, 12))
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    views[0] = torch.cat([tensors[0], tensors[0]], dim=2)[:, :, :12]
    for ours, truth in zip(triton_results(*views), triton_results(*tensors), strict=True):
        assert torch.equal(ours, truth)


@pytest.mark.parametrize("deviation", [1.0, 9.0])
def test_reads_no_memory_it_did_not_write(deviation):
    """With NaN in every fresh allocation, an unwritten output shows."""
    tensors = inputs((1, 67, 19), deviation=deviation)
    plain = triton_results(*tensors)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        poisoned = triton_results(*tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


def test_operator_is_registered_as_torch_expects():
    q, k, v, grad = inputs((1, 9, 3))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.cat_fast.scalar_attention_triton.default, tuple(leaves))
    torch.library.opcheck(
        torch.ops.cat_fast.scalar_attention_backward_triton.default, (grad, *(t.detach() for t in leaves))
    )


def test_the_function_runs_it_where_it_is_forced(monkeypatch):
    monkeypatch.setenv("CAT_FAST_BACKEND", "triton")
    q, k, v, grad = inputs((1, 40, 3))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    y = scalar_attention(*leaves)
    gradients = torch.autograd.grad(y, leaves, grad)
    for ours, truth in zip((y, *gradients), triton_results(q, k, v, grad), strict=True):
        assert torch.equal(ours, truth)
