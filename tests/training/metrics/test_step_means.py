"""One reduction sums values over ranks and shares stop requests and errors."""

import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.training.metrics.step_means import RatioSums, means, means_at_ratios, reduce_step
from cat_fast.training.runtime.collective_errors import SharedError
from cat_fast.training.runtime.ranks import Ranks
from tests.training.thread_ranks import on_thread_ranks

CPU = torch.device("cpu")


def test_tensors_of_any_shape_are_summed_in_float64_without_modification():
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    def reduce(ranks: Ranks) -> tuple[bool, list[torch.Tensor]]:
        return reduce_step(ranks, torch.tensor([2**40 + ranks.rank, 1]), table, torch.zeros(0))

    for stop, (counts, summed, nothing) in on_thread_ranks(3, reduce):
        assert not stop
        assert counts.dtype == torch.float64
        assert counts.tolist() == [3 * 2**40 + 3, 3]
        assert torch.equal(summed, table.double() * 3)
        assert nothing.shape == (0,)
    assert torch.equal(table, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_stop_request_of_one_rank_reaches_all():
    found = on_thread_ranks(3, lambda ranks: reduce_step(ranks, torch.ones(1), stop=ranks.rank == 1))
    assert [stop for stop, _ in found] == [True] * 3


def test_error_of_one_rank_is_raised_on_all():
    def reduce(ranks: Ranks) -> str:
        with pytest.raises(SharedError) as raised:
            reduce_step(ranks, torch.ones(1), error=UserError("disk full") if ranks.rank == 2 else None)
        return str(raised.value)

    assert on_thread_ranks(3, reduce) == ["disk full (on rank 2)"] * 3


def test_means_weight_each_batch_and_skip_ratios_without_weight():
    sums = RatioSums(["l1", "kl"], [8, 16, 32], CPU)
    sums.add(8, {"kl": torch.tensor(4.0), "l1": torch.tensor(1.0)}, 3)
    sums.add(32, {"kl": torch.tensor(8.0), "l1": torch.tensor(5.0)}, 1)
    sums.add(16, {"kl": torch.tensor(9.0), "l1": torch.tensor(9.0)}, 0)  # a dummy batch
    assert means(sums.names, sums.table) == {"l1": 2.0, "kl": 5.0}
    assert means_at_ratios(sums.names, [8, 16, 32], sums.table) == {
        "l1_8x": 1.0,
        "kl_8x": 4.0,
        "l1_32x": 5.0,
        "kl_32x": 8.0,
    }
