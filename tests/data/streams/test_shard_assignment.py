"""Every sample belongs to one rank an epoch, and a change of the number of ranks loses none."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cat_fast.data.streams.shard_assignment import Dealing

SAMPLES = 12
"""In each shard; there are no more ranks, so each takes some of a shard that they share."""
sizes = st.integers(1, 12)


def taken(dealing: Dealing, ratio: int, epoch: int, rank: int, count: int | None = None) -> Counter:
    """(shard, number) that a rank takes from the first `count` shards of its hand."""
    hand = dealing.hand(ratio, epoch, rank)
    return Counter(
        (shard, n) for shard in hand.shards[:count] for n in range(SAMPLES) if hand.takes(shard, n)
    )


@given(shards=sizes, world_size=sizes, seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_each_sample_of_each_shard_is_dealt_to_one_rank_an_epoch(shards, world_size, seed, epoch):
    dealing = Dealing(shards, world_size, seed)
    dealt = sum((taken(dealing, 8, epoch, rank) for rank in range(world_size)), Counter())
    assert dealt == Counter((shard, n) for shard in range(shards) for n in range(SAMPLES))


def test_epochs_and_seeds_have_orders_of_their_own_and_ratios_share_them():
    hands = {(seed, epoch): Dealing(40, 4, seed).hand(8, epoch, 1) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len({tuple(hand.shards) for hand in hands.values()}) == 6
    for (seed, epoch), hand in hands.items():
        assert Dealing(40, 4, seed).hand(32, epoch, 1) == hand


def test_a_rank_that_shares_shards_gets_other_places_in_each_epoch():
    """Or one whose ratio is that of every other sample would never come."""
    dealing = Dealing(3, 4, 0)
    places = {n for epoch in range(4) for _, n in taken(dealing, 8, epoch, 1)}
    assert places == set(range(SAMPLES))


@st.composite
def interrupted(draw):
    """A dealing, where each of its ranks is, and the next number of ranks."""
    shards, world_size = draw(sizes), draw(sizes)
    dealing = Dealing(shards, world_size, draw(st.integers(0, 9)))
    for _ in range(draw(st.integers(0, 1))):  # one that has changed before
        dealing = dealing.resumed(draw(sizes), {8: draw(positions(dealing, 0))})
    epoch = dealing.first_epoch(8) + draw(st.integers(0, 2))
    return dealing, draw(positions(dealing, epoch)), draw(sizes)


def positions(dealing: Dealing, epoch: int):
    """Each rank in this epoch or the next, so many shards into its hand."""

    @st.composite
    def draw_them(draw):
        found = []
        for rank in range(dealing.world_size):
            its_epoch = epoch + draw(st.integers(0, 1))
            most = len(dealing.hand(8, its_epoch, rank).shards)
            found.append((its_epoch, draw(st.integers(0, most))))
        return found

    return draw_them()


@given(interrupted())
def test_on_another_number_of_ranks_nothing_is_lost_and_what_was_finished_does_not_come_again(case):
    dealing, reached, world_size = case
    resumed = dealing.resumed(world_size, {8: reached})
    epoch = min(its_epoch for its_epoch, _ in reached)
    assert resumed.first_epoch(8) == epoch
    before, finished_by = Counter(), Counter()
    for rank, (its_epoch, count) in enumerate(reached):
        before += taken(dealing, 8, epoch, rank, None if its_epoch > epoch else count)
    whole_epoch = sum((taken(dealing, 8, epoch, rank) for rank in range(dealing.world_size)), Counter())
    after = sum((taken(resumed, 8, epoch, rank) for rank in range(world_size)), Counter())
    assert max(after.values(), default=1) == 1
    assert before.keys() | after.keys() >= whole_epoch.keys()
    for shard in range(dealing.shard_count):  # those of which all was finished
        samples = {(shard, n) for n in range(SAMPLES)}
        finished_by[shard] = len(samples & before.keys()) == SAMPLES
        if finished_by[shard]:
            assert not samples & after.keys()
    assert sum((taken(resumed, 8, epoch + 1, rank) for rank in range(world_size)), Counter()) == Counter(
        (shard, n) for shard in range(dealing.shard_count) for n in range(SAMPLES)
    )


@given(interrupted())
def test_a_dealing_comes_back_from_its_state(case):
    dealing, reached, world_size = case
    resumed = dealing.resumed(world_size, {8: reached})
    again = Dealing(dealing.shard_count, world_size, dealing.seed).with_state(resumed.state_dict())
    assert again == resumed


def test_the_state_of_a_change_is_small_at_the_size_of_the_paper():
    dealing = Dealing(38_000, 64, 0)
    resumed = dealing.resumed(128, {8: [(0, 300)] * 64})
    assert len(str(resumed.state_dict())) < 10_000
    assert len(resumed.hand(8, 0, 0).shards) == pytest.approx((38_000 - 64 * 300) / 128, abs=1)
