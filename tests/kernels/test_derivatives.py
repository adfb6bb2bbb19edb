"""Second derivatives, forward mode and transforms of torch.func through every operator and backend."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from cat_fast.errors import UserError
from cat_fast.kernels import derivatives
from cat_fast.kernels.adaln.op import adaln, gate_residual_adaln
from cat_fast.kernels.group_norm_silu.op import group_norm_silu
from cat_fast.kernels.pack.op import pack, unpack
from cat_fast.kernels.scalar_attention.op import scalar_attention
from cat_fast.kernels.sdpa import scaled_dot_product_attention
from cat_fast.kernels.varlen_attention.op import varlen_attention
from cat_fast.kernels.wide_attention.op import wide_attention

EPS = 1e-6
GRIDS = [(2, 1), (1, 3)]


def offsets(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


LENGTHS = offsets(3, 0, 2)
KEYS = offsets(1, 2, 4)
# name: function of float tensors, the operators it runs, and the shapes of its arguments
CASES = {
    "group_norm_silu": (
        lambda x, w, b: group_norm_silu(x, w, b, 2, EPS),
        ["group_norm_silu"],
        [(2, 4, 2, 3), (4,), (4,)],
    ),
    "group_norm": (
        lambda x, w, b: group_norm_silu(x, w, b, 2, EPS, activation=False),
        ["group_norm_silu"],
        [(1, 4, 5), (4,), (4,)],
    ),
    "group_norm_input_bias": (
        lambda x, w, b, input_bias: group_norm_silu(x, w, b, 2, EPS, input_bias=input_bias),
        ["group_norm_silu"],
        [(2, 4, 3), (4,), (4,), (4,)],
    ),
    "scalar_attention": (scalar_attention, ["scalar_attention"], [(2, 3, 2)] * 3),
    "varlen_attention": (
        lambda q, k, v: varlen_attention(q, k, v, LENGTHS, 3),
        ["varlen_attention"],
        [(5, 1, 32)] * 3,
    ),
    "cross_attention": (
        lambda q, k, v: varlen_attention(q, k, v, LENGTHS, 3, KEYS, 4),
        ["varlen_attention"],
        [(5, 1, 32), (7, 1, 32), (7, 1, 32)],
    ),
    "wide_attention": (wide_attention, ["wide_attention"], [(1, 3, 1, 256)] * 3),
    "adaln": (
        lambda x, shift, scale: adaln(x, shift, scale, LENGTHS, EPS),
        ["adaln"],
        [(5, 4), (3, 4), (3, 4)],
    ),
    "gate_residual_adaln": (
        lambda x, h, gate, shift, scale: gate_residual_adaln(x, h, gate, shift, scale, LENGTHS, EPS),
        ["gate_residual_adaln"],
        [(5, 4), (5, 4), (3, 4), (3, 4), (3, 4)],
    ),
    "pack": (lambda a, b: pack([a, b], 2), ["pack"], [(3, 4, 2), (3, 2, 6)]),
    "unpack": (lambda tokens: tuple(unpack(tokens, GRIDS, 2)), ["pack"], [(5, 12)]),
}
WITHOUT_INTERPRETER = ["reference", "cpp"]
BACKENDS = [*WITHOUT_INTERPRETER, "triton"]


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture(params=BACKENDS)
def forced(request, case, require, monkeypatch):
    """Force a backend for the operators of `case`."""
    for operator in CASES[case][1]:
        if operator == "wide_attention" and request.param == "cpp":
            pytest.skip("SDPA is its C++ kernel")
        if operator == "wide_attention" and request.param == "triton":
            force_wide_attention(monkeypatch)
        else:
            require(operator, request.param)
            monkeypatch.setenv("CAT_FAST_BACKEND", request.param)
    return request.param


def force_wide_attention(monkeypatch):
    from cat_fast.kernels import backends

    if (reason := backends.triton_unavailable_reason()) or not backends.triton_is_interpreted():
        pytest.skip(f"wide_attention: {reason or 'Triton compiles kernels here'}")
    monkeypatch.setenv("CAT_FAST_BACKEND", "wide_attention=triton")


def arguments(case, dtype=torch.float32, batch=()):
    generator = torch.Generator().manual_seed(0)
    shapes = CASES[case][2]
    return tuple(
        torch.randn(*batch, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )


def loss_of(case):
    """Return a scalar function of the arguments of `case` with non-zero derivatives of every order."""
    function = CASES[case][0]

    def loss(*leaves):
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # different weights, so that sums that normalisation makes constant do not cancel
        return sum(
            ((y + 0.3).pow(3) * torch.linspace(0.5, 2, y.numel()).view(y.shape).to(y)).sum() for y in outputs
        )

    return loss


def penalty(case, leaves):
    """Return the sum of squared gradients of the loss, as a differentiable function of the leaves."""
    gradients = torch.autograd.grad(loss_of(case)(*leaves), leaves, create_graph=True)
    return sum(gradient.square().sum() for gradient in gradients)


def require_grad(tensors):
    return [x.detach().requires_grad_() for x in tensors]


def double(function, case, monkeypatch):
    """Return function(leaves) in float64, on the reference."""
    with monkeypatch.context() as patch:
        patch.delenv("CAT_FAST_BACKEND", raising=False)
        return function(require_grad(arguments(case, torch.float64)))


def assert_close(got, truth, tolerance=1e-4):
    for ours, right in zip(got, truth, strict=True):
        assert right.abs().max() > 0
        assert ((ours.double() - right).abs().max() / right.abs().max()).item() < tolerance


def test_derivatives_of_the_reference_match_finite_differences(case):
    function, leaves = CASES[case][0], require_grad(arguments(case, torch.float64))
    if case == "wide_attention":  # 256 features in every dimension
        function, leaves = scaled_dot_product_attention, require_grad(torch.randn(3, 1, 2, 3).double())
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True)


def test_second_derivatives_match_float64(case, forced, monkeypatch):
    def second(leaves):
        return torch.autograd.grad(penalty(case, leaves), leaves)

    assert_close(second(require_grad(arguments(case))), double(second, case, monkeypatch))


def test_forward_mode_matches_float64(case, forced, monkeypatch):
    def derivative(leaves):
        leaves = tuple(x.detach() for x in leaves)
        directions = tuple(x.cos() for x in leaves)
        _, by_func = torch.func.jvp(loss_of(case), leaves, directions)
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, leaves, directions)
            tangent = forward_ad.unpack_dual(loss_of(case)(*duals)).tangent
        return [by_func, tangent]

    got = derivative(arguments(case))
    assert_close(got, double(derivative, case, monkeypatch))
    leaves = require_grad(arguments(case))
    gradients = torch.autograd.grad(loss_of(case)(*leaves), leaves)
    expected = sum((gradient * x.cos()).sum() for gradient, x in zip(gradients, leaves, strict=True))
    assert_close(got, [expected.detach().double()] * 2)


def test_transforms_of_torch_func_match_autograd(case, forced):
    leaves = require_grad(arguments(case))
    indices = tuple(range(len(leaves)))
    expected = [x.double() for x in torch.autograd.grad(loss_of(case)(*leaves), leaves)]
    plain = arguments(case)
    assert_close(torch.func.grad(loss_of(case), indices)(*plain), expected)
    assert_close(torch.func.vjp(loss_of(case), *plain)[1](torch.ones(())), expected)
    batch = arguments(case, batch=(2,))
    per_sample = torch.func.vmap(torch.func.grad(loss_of(case), indices))(*batch)
    for i in range(2):
        leaves = require_grad([x[i] for x in batch])
        gradients = torch.autograd.grad(loss_of(case)(*leaves), leaves)
        assert_close([x[i] for x in per_sample], [x.double() for x in gradients])


def test_gradients_may_be_batched_and_have_tangents(case, forced):
    """Only the backward pass is transformed: the forward pass has run on the kernel."""
    leaves = require_grad(arguments(case))
    loss = loss_of(case)(*leaves)
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    batched = torch.autograd.grad(
        loss, leaves, torch.tensor([1.0, 2.0]), is_grads_batched=True, retain_graph=True
    )
    assert_close([x[1] for x in batched], [2 * x.double() for x in expected])
    with forward_ad.dual_level():
        one = forward_ad.make_dual(torch.tensor(1.0), torch.tensor(3.0))
        if "group_norm" in case:  # torch itself requires create_graph=True here
            with pytest.raises(NotImplementedError, match="forward AD"):
                torch.autograd.grad(loss, leaves, one, retain_graph=True)
        create_graph = "group_norm" in case
        gradients = torch.autograd.grad(loss, leaves, one, create_graph=create_graph)
        duals = [forward_ad.unpack_dual(x) for x in gradients]
    assert_close([dual.tangent.detach() for dual in duals], [3 * x.double() for x in expected])


@pytest.mark.parametrize("case", ["adaln", "scalar_attention"])
@pytest.mark.parametrize("forced", WITHOUT_INTERPRETER, indirect=True)
def test_third_derivatives_and_nested_forward_mode_match_finite_differences(case, forced, monkeypatch):
    """Those of torch's own layer_norm are wrong, and its attention kernels have none."""
    x, *others = arguments(case, torch.float64)
    direction = x.cos()

    def along(x, others, order):
        """Return the derivative of this order in `direction`."""
        if order == 0:
            return loss_of(case)(x, *others)
        x = x if x.requires_grad else x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(along(x, others, order - 1), x, create_graph=True)
        return (gradient * direction.to(x)).sum()

    def nested(x, others):
        def derivative(function):
            return lambda x: torch.func.jvp(function, (x,), (direction.to(x),))[1]

        return derivative(derivative(lambda x: loss_of(case)(x, *others)))(x)

    third = along(x.float(), [other.float() for other in others], 3).item()
    second = nested(x.float(), [other.float() for other in others]).item()
    monkeypatch.delenv("CAT_FAST_BACKEND")
    step = 1e-4
    values = [along(x + step * direction, others, 2).item(), along(x - step * direction, others, 2).item()]
    assert third == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3)
    assert second == pytest.approx(sum(values) / 2, rel=1e-3)


@pytest.mark.parametrize("forced", WITHOUT_INTERPRETER, indirect=True)
def test_checkpointing_does_not_change_second_derivatives(case, forced):
    def second(leaves, run):
        gradients = torch.autograd.grad(run(loss_of(case), *leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in gradients), leaves)

    def checkpointed(function, *leaves):
        return checkpoint(function, *leaves, use_reentrant=False)

    want = second(require_grad(arguments(case)), lambda function, *leaves: function(*leaves))
    got = second(require_grad(arguments(case)), checkpointed)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))
    leaves = require_grad(arguments(case))
    within = torch.autograd.grad(checkpointed(lambda *leaves: penalty(case, leaves), *leaves), leaves)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(within, want, strict=True))


@pytest.mark.parametrize("mode", ["plain", "checkpoint", "autocast", "compile"])
def test_first_derivatives_do_not_run_the_reference(case, forced, monkeypatch, mode):
    def fail(*_):
        raise AssertionError("the reference was differentiated")

    monkeypatch.setattr(derivatives, "vjp", fail)
    leaves, loss = require_grad(arguments(case)), loss_of(case)
    if mode == "checkpoint":
        checkpoint(loss, *leaves, use_reentrant=False).backward()
    elif mode == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss(*leaves).backward()
    elif mode == "compile":
        if forced != "cpp":
            pytest.skip("it is the same for all operators of torch")
        torch._dynamo.reset()
        torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves).backward()
    else:
        loss(*leaves).backward()
    assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [None, 1.0])
def test_sdpa_is_torchs_bit_for_bit(dtype, scale):
    results = []
    for function in (F.scaled_dot_product_attention, scaled_dot_product_attention):
        q, k, v = require_grad(
            torch.randn(3, 2, 2, 9, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        )
        y = function(q, k, v, scale=scale)
        results.append((y, *torch.autograd.grad(y, (q, k, v), y.detach().cos())))
    assert all(torch.equal(ours, torchs) for ours, torchs in zip(*results, strict=True))


@pytest.mark.parametrize("forced", WITHOUT_INTERPRETER, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivatives_keep_the_dtypes_of_autocast(case, forced, dtype):
    leaves = require_grad(arguments(case, dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = torch.autograd.grad(loss_of(case)(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.float().square().sum() for x in gradients), leaves)
    assert [x.dtype for x in (*gradients, *second)] == [dtype] * 2 * len(leaves)
    assert all(x.isfinite().all() for x in second)


def test_direct_calls_of_the_operators_refuse_derivatives_that_would_be_zero(case, forced):
    if forced == "reference":
        pytest.skip("the reference is not a torch operator")
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.namespace == "cat_fast":
                calls.append((operator, args))
            return operator(*args, **(kwargs or {}))

    leaves = require_grad(arguments(case))
    loss = loss_of(case)
    with Record():
        loss(*leaves).backward()
    assert len(calls) == 2  # forward and backward
    for operator, args in calls:
        args = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        first = args[0][0] if isinstance(args[0], list) else args[0]

        def call(x, operator=operator, args=args):
            head = [x, *args[0][1:]] if isinstance(args[0], list) else x
            return torch.utils._pytree.tree_leaves(operator(head, *args[1:]))[0].sum()

        with pytest.raises(NotImplementedError, match=f"{operator.name().split('::')[1]}.*cat_fast.kernels"):
            torch.func.jvp(call, (first,), (first,))
        with pytest.raises(NotImplementedError, match=r"cat_fast\.kernels"):
            torch.func.grad(call)(first)
        if "backward" in operator.name():
            with pytest.raises(NotImplementedError, match=r"cat_fast\.kernels"):
                call(first.clone().requires_grad_())
        with forward_ad.dual_level():  # without tangents nothing is lost
            call(first)


def test_a_forced_backend_that_cannot_run_is_refused_within_transforms(monkeypatch):
    monkeypatch.setenv("CAT_FAST_BACKEND", "unknown")
    with pytest.raises(UserError, match="unknown"):
        torch.func.grad(loss_of("adaln"))(*arguments("adaln"))
