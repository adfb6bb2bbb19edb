"""The breakdown: whose work it is, and whose tensors were alive when most memory was taken."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.shared.breakdown import REST, Recorder, breakdown, kind_of

MIB = 2**20


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::convolution_backward", "convolution"),
        ("cat_fast::group_norm_silu", "norm"),
        ("cat_fast::scalar_attention_backward", "attention"),
        ("aten::addmm", "attention"),
        ("aten::add.Tensor", REST),
    ],
)
def test_operators_are_classified_by_name(operator, kind):
    assert kind_of(operator) == kind


def test_tensors_count_until_they_are_freed_and_views_do_not():
    weight = torch.ones(512, 512)
    with Recorder() as recorder:
        first = torch.ones(512, 512)  # 1 MiB
        product = first @ weight
        view = product.view(-1)
        view.add_(1)
        assert recorder.live == {"convolution": 0, "norm": 0, "attention": MIB, REST: MIB}
        del product
        assert recorder.live["attention"] == MIB, "the view keeps it alive"
        del view, first
        assert sum(recorder.live.values()) == 0
        torch.ones(4, 512, 512)
    assert recorder.peak == {"convolution": 0, "norm": 0, "attention": 0, REST: 4 * MIB}


def test_the_height_is_that_of_one_moment_through_the_backward_pass():
    x = torch.rand(1, 4, 128, 128, requires_grad=True)
    weight = torch.rand(8, 4, 3, 3, requires_grad=True)

    def step():
        F.conv2d(x, weight, padding=1).square().sum().backward()

    found = breakdown(step)
    output, gradient = 8 * 128 * 128 * 4, 4 * 128 * 128 * 4
    assert found["peak_bytes"]["convolution"] >= output
    assert found["peak_bytes"]["convolution"] <= 2 * (output + gradient)
    assert found["seconds"]["convolution"] > 0
    assert found["seconds"]["attention"] == 0
