"""Shard assignment: each sample belongs to one rank per epoch, and a new number of ranks loses none."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cat_fast.data.streams.shard_assignment import ShardAssignment

SAMPLES = 12
"""Samples per shard; at least the number of ranks, so each rank gets samples of a shared shard."""
sizes = st.integers(1, 12)


def taken(
    assignment: ShardAssignment, ratio: int, epoch: int, rank: int, count: int | None = None
) -> Counter:
    """Return the (shard, number) pairs that a rank reads from its first `count` shards."""
    rank_shards = assignment.rank_shards(ratio, epoch, rank)
    return Counter(
        (shard, n)
        for shard in rank_shards.shards[:count]
        for n in range(SAMPLES)
        if rank_shards.includes(shard, n)
    )


@given(shards=sizes, world_size=sizes, seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_each_sample_belongs_to_one_rank_per_epoch(shards, world_size, seed, epoch):
    assignment = ShardAssignment(shards, world_size, seed)
    dealt = sum((taken(assignment, 8, epoch, rank) for rank in range(world_size)), Counter())
    assert dealt == Counter((shard, n) for shard in range(shards) for n in range(SAMPLES))


def test_order_depends_on_seed_and_epoch_but_not_on_ratio():
    per_rank = {
        (seed, epoch): ShardAssignment(40, 4, seed).rank_shards(8, epoch, 1)
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len({tuple(rank_shards.shards) for rank_shards in per_rank.values()}) == 6
    for (seed, epoch), rank_shards in per_rank.items():
        assert ShardAssignment(40, 4, seed).rank_shards(32, epoch, 1) == rank_shards


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_that_shares_shards_gets_other_samples_of_each_shard_and_in_each_epoch(rank):
    """Otherwise a ratio that occurs in every fourth sample of each shard could be missing on a rank."""
    assignment = ShardAssignment(3, 4, 0)
    place = {
        (epoch, shard): n % 4
        for epoch in range(4)
        for shard, n in taken(assignment, 8, epoch, rank)
        if n < assignment.world_size
    }
    for epoch in range(4):
        assert len({place[epoch, shard] for shard in range(3)}) == 3
    for shard in range(3):
        assert {place[epoch, shard] for epoch in range(4)} == {0, 1, 2, 3}


@st.composite
def interrupted(draw):
    """Draw an assignment, the progress of its ranks, and the next number of ranks."""
    shards, world_size = draw(sizes), draw(sizes)
    assignment = ShardAssignment(shards, world_size, draw(st.integers(0, 9)))
    for _ in range(draw(st.integers(0, 1))):  # after an earlier change
        assignment = assignment.reassign(draw(sizes), {8: draw(positions(assignment, 0))})
    epoch = assignment.first_epoch(8) + draw(st.integers(0, 2))
    return assignment, draw(positions(assignment, epoch)), draw(sizes)


def positions(assignment: ShardAssignment, epoch: int):
    """Draw the progress of all ranks: this epoch or the next, and a number of finished shards."""

    @st.composite
    def draw_them(draw):
        found = []
        for rank in range(assignment.world_size):
            rank_epoch = epoch + draw(st.integers(0, 1))
            count = len(assignment.rank_shards(8, rank_epoch, rank).shards)
            found.append((rank_epoch, draw(st.integers(0, count))))
        return found

    return draw_them()


@given(interrupted())
def test_another_number_of_ranks_loses_nothing_and_repeats_no_finished_shard(case):
    assignment, reached, world_size = case
    resumed = assignment.reassign(world_size, {8: reached})
    epoch = min(rank_epoch for rank_epoch, _ in reached)
    assert resumed.first_epoch(8) == epoch
    before, finished_by = Counter(), Counter()
    for rank, (rank_epoch, count) in enumerate(reached):
        before += taken(assignment, 8, epoch, rank, None if rank_epoch > epoch else count)
    whole_epoch = sum((taken(assignment, 8, epoch, rank) for rank in range(assignment.world_size)), Counter())
    after = sum((taken(resumed, 8, epoch, rank) for rank in range(world_size)), Counter())
    assert max(after.values(), default=1) == 1
    assert before.keys() | after.keys() == whole_epoch.keys(), "also what an earlier change left done"
    for shard in range(assignment.shard_count):  # shards finished completely
        samples = {(shard, n) for n in range(SAMPLES)}
        finished_by[shard] = len(samples & before.keys()) == SAMPLES
        if finished_by[shard]:
            assert not samples & after.keys()
    assert sum((taken(resumed, 8, epoch + 1, rank) for rank in range(world_size)), Counter()) == Counter(
        (shard, n) for shard in range(assignment.shard_count) for n in range(SAMPLES)
    )


@given(interrupted())
def test_an_assignment_is_restored_from_its_state(case):
    assignment, reached, world_size = case
    resumed = assignment.reassign(world_size, {8: reached})
    again = ShardAssignment(assignment.shard_count, world_size, assignment.seed).with_state(
        resumed.state_dict()
    )
    assert again == resumed


def test_the_state_is_small_at_the_scale_of_the_paper():
    assignment = ShardAssignment(38_000, 64, 0)
    resumed = assignment.reassign(128, {8: [(0, 300)] * 64})
    assert len(str(resumed.state_dict())) < 10_000
    assert len(resumed.rank_shards(8, 0, 0).shards) == pytest.approx((38_000 - 64 * 300) / 128, abs=1)
