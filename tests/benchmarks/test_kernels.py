"""The benchmark of the operators, at toy sizes: all rivals do the same work, and the keys are as promised."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import harness, kernels

ONCE = harness.Effort(least_pairs=1, most_pairs=1, seconds=0.0)
TOYS = (
    kernels.Entry(
        op="group_norm_silu",
        shape="toy",
        setup=partial(kernels.group_norm_silu_channels_last, 2, 64, 5, 3),
        forward=("eager",),  # "compile" is the same function, and slow to compile
        forward_backward=("eager",),
    ),
    kernels.Entry(
        op="varlen_attention",
        shape="toy",
        setup=partial(kernels.varlen_attention_packed, 2, 8, [3, 3, 1, 6]),
        forward=("padded", "loop"),
        forward_backward=("padded", "loop"),
    ),
    kernels.Entry(
        op="scalar_attention",
        shape="toy",
        setup=partial(kernels.scalar_attention_normal, 3, 40),
        forward=("sdpa",),
        forward_backward=("sdpa",),
    ),
    kernels.Entry(
        op="pack",
        shape="toy",
        setup=partial(kernels.pack_mixed, 8, [8, 4, 4]),
        forward=("eager",),
        forward_backward=("eager",),
    ),
)


@pytest.mark.parametrize(("key", "setup"), kernels.cases(TOYS).items(), ids=kernels.cases(TOYS))
def test_ours_and_the_baselines_agree_with_float64(key, setup):
    result = harness.measure(setup(), ONCE)
    assert result.right, result.wrong()
    assert len(result.ratios) == len(result.errors) - 1 > 0


def test_every_operator_of_the_table_is_tried_here():
    assert {entry.op for entry in kernels.TABLE} == {entry.op for entry in TOYS}
    for toy in TOYS:
        for name in kernels.PASSES:
            rivals = {vs for entry in kernels.TABLE if entry.op == toy.op for vs in getattr(entry, name)}
            assert rivals - {"compile"} == {*getattr(toy, name)}


@pytest.mark.parametrize("spoiled", ["y", "dx", "dweight", "dbias"])
def test_a_spoiled_output_or_gradient_is_found(spoiled):
    """What the harness compares is the output and the gradient of every input."""
    case = kernels.case(TOYS[0], "forward_backward")
    index = ["y", "dx", "dweight", "dbias"].index(spoiled)

    def spoil():
        tensors = list(case.ours.run())
        tensors[index] = tensors[index] * 1.001
        return tensors

    wrong = harness.Contestant(run=spoil, outputs=case.ours.outputs)
    result = harness.measure(replace(case, ours=wrong), ONCE)
    assert result.wrong().keys() == {"ours"}


def test_keys_are_operator_shape_and_pass():
    assert len(kernels.cases()) == sum(bool(e.forward) + bool(e.forward_backward) for e in kernels.TABLE)
    for key in kernels.cases():
        assert re.fullmatch(r"[a-z_]+\.[\w+]+\.(forward|forward_backward)", key)


def test_work_is_counted_as_by_hand():
    x_bytes = 2 * 64 * 5 * 3 * 4
    assert kernels.case(TOYS[0], "forward").bytes_moved == 3 * x_bytes
    assert kernels.case(TOYS[0], "forward_backward").bytes_moved == 8 * x_bytes
    # Two heads, 55 pairs of tokens, two products of 8 multiplications and additions each.
    assert kernels.case(TOYS[1], "forward").flops == 2 * 55 * 2 * 8 * 2
    assert kernels.case(TOYS[2], "forward").bytes_moved == 2 * 8 * (64 + 16 + 16) * 4


def test_padding_is_restored_in_packed_order():
    setup = TOYS[1].setup()
    padded = setup.baselines["padded"]
    for packed, x in zip(setup.ours.inputs, padded.inputs, strict=True):
        assert x.shape == (4, 6, 2, 8)
        assert torch.equal(padded.restore(x), packed)
