"""Work on many items that ranks divide."""

import pytest

from cat_fast.errors import UserError
from cat_fast.training.runtime.divided_work import map_over_ranks
from tests.training.thread_ranks import on_thread_ranks


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_every_item_is_computed_once_and_results_are_in_order(world_size, count):
    computed = []

    def square(items):
        computed.extend(items)
        return [item**2 for item in items]

    found = on_thread_ranks(
        world_size, lambda ranks: list(map_over_ranks(square, range(count), ranks, per_rank=2))
    )
    assert sorted(computed) == list(range(count))
    for parts in found:
        assert [result for part in parts for result in part] == [item**2 for item in range(count)]
        assert all(len(part) == 2 * world_size for part in parts[:-1])


def test_an_error_of_one_rank_and_different_items_end_all_of_them():
    def fail(items):
        if 3 in items:
            raise UserError("3 is missing")
        return items

    def refused(ranks, size_of):
        with pytest.raises(UserError) as caught:
            list(map_over_ranks(fail, range(size_of(ranks)), ranks, per_rank=2))
        return str(caught.value)

    assert on_thread_ranks(2, lambda ranks: refused(ranks, lambda _: 4)) == ["3 is missing (on rank 1)"] * 2
    first, second = on_thread_ranks(2, lambda ranks: refused(ranks, lambda ranks: 3 - ranks.rank))
    assert first == second == "got 2 images, rank 0 3: all ranks must see the same files (on rank 1)"
