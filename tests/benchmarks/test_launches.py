"""Operators after a step's backward pass: as many for few tensors as for many, without waits."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.launches import Weights, count, tail, usual_tail


@pytest.mark.parametrize("tensors", [3, 40])
def test_the_tail_does_not_grow_with_the_number_of_tensors(tensors):
    sizes = [torch.Size([4, 2])] * tensors
    with FakeTensorMode():
        ours = count(tail(Weights(sizes)))
        per_tensor, foreach = (count(usual_tail(Weights(sizes), foreach=many)) for many in (False, True))
    assert ours == {"guard": 15, "optimizer": 2, "average": 1, "all": 18}
    assert per_tensor["all"] > 7 * tensors
    assert foreach["all"] < 30
