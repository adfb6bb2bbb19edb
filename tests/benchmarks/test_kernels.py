"""The benchmark of the operators, at toy sizes: all rivals do the same work, and the keys are as promised."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import kernels
from benchmarks.shared import harness

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
    *(
        kernels.Entry(
            op=op,
            shape="toy",
            setup=partial(kernels.adaln_packed, 24, [3, 1, 40, 6], gated=gated),
            forward=("eager",),
            forward_backward=("eager",),
        )
        for op, gated in (("adaln", False), ("gate_residual_adaln", True))
    ),
    kernels.Entry(
        op="wide_attention",
        shape="toy",
        setup=partial(kernels.wide_attention_one_head, 5, 256),
        forward=("eager", "sdpa"),
        forward_backward=("eager", "sdpa"),
    ),
)


@pytest.mark.parametrize(("key", "setup"), kernels.cases(TOYS).items(), ids=kernels.cases(TOYS))
def test_ours_and_the_baselines_agree_with_float64(key, setup, measure_once):
    result = measure_once(setup())
    assert result.right, result.wrong()
    assert len(result.ratios) == len(result.errors) - 1 > 0


def test_every_operator_of_the_table_is_tried_here():
    assert {entry.op for entry in kernels.TABLE} == {entry.op for entry in TOYS}
    for toy in TOYS:
        for name in kernels.PASSES:
            rivals = {vs for entry in kernels.TABLE if entry.op == toy.op for vs in getattr(entry, name)}
            assert rivals - {"compile"} == {*getattr(toy, name)}


@pytest.mark.parametrize("spoiled", ["y", "dx", "dweight", "dbias"])
def test_a_spoiled_output_or_gradient_is_found(spoiled, measure_once):
    """What the harness compares is the output and the gradient of every input."""
    case = kernels.case(TOYS[0], "forward_backward")
    index = ["y", "dx", "dweight", "dbias"].index(spoiled)

    def spoil():
        tensors = list(case.ours.run())
        tensors[index] = tensors[index] * 1.001
        return tensors

    wrong = harness.Contestant(run=spoil, outputs=case.ours.outputs)
    result = measure_once(replace(case, ours=wrong))
    assert result.wrong().keys() == {"ours"}


def test_keys_are_operator_shape_and_pass():
    assert len(kernels.cases()) == sum(bool(e.forward) + bool(e.forward_backward) for e in kernels.TABLE)
    for key in kernels.cases():
        assert re.fullmatch(r"[a-z_]+\.[\w+]+\.(forward|forward_backward)", key)


def test_work_is_counted_as_by_hand():
    def work(op, which):
        (toy,) = (toy for toy in TOYS if toy.op == op)
        case = kernels.case(toy, which)
        return case.bytes_moved or case.flops

    x_bytes = 2 * 64 * 5 * 3 * 4
    assert work("group_norm_silu", "forward") == 3 * x_bytes
    assert work("group_norm_silu", "forward_backward") == 8 * x_bytes
    # Two heads, 55 pairs of tokens, two products of 8 multiplications and additions each.
    assert work("varlen_attention", "forward") == 2 * 55 * 2 * 8 * 2
    assert work("pack", "forward") == 2 * 8 * (64 + 16 + 16) * 4
    x_bytes = 50 * 24 * 4
    assert work("adaln", "forward") == 2 * x_bytes  # x, y
    assert work("adaln", "forward_backward") == 5 * x_bytes  # and dy, x, dx
    assert work("gate_residual_adaln", "forward_backward") == 10 * x_bytes


def test_padding_is_restored_in_packed_order():
    setup = TOYS[1].setup()
    padded = setup.baselines["padded"]
    for packed, x in zip(setup.ours.inputs, padded.inputs, strict=True):
        assert x.shape == (4, 6, 2, 8)
        assert torch.equal(padded.restore(x), packed)
