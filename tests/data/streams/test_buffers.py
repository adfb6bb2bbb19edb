"""Shuffle buffers: each image once per epoch, in bounded memory, independent of other ratios."""

import time
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_fast.data.streams import buffers
from cat_fast.data.streams.buffers import Position
from cat_fast.data.streams.formats.base import UnreadableShard
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.open_shards import OpenShards
from cat_fast.data.streams.pool import WorkerPool
from cat_fast.data.streams.shard_assignment import ShardAssignment
from cat_fast.errors import UserError
from tests.data.streams.sets import BY_INDEX, MemoryShard, MemoryShards, as_list, keys_of_epochs, make_reader

ratio_lists = st.lists(st.lists(st.sampled_from([8, 16, 32]), min_size=1, max_size=9), min_size=1, max_size=6)


def every_key(ratios: list[list[int]], ratio: int) -> Counter:
    return Counter(f"{s}-{n}" for s, fs in enumerate(ratios) for n, f in enumerate(fs) if f == ratio)


@settings(max_examples=60, deadline=None)
@given(ratio_lists, st.integers(1, 4), st.integers(1, 6), st.integers(100, 1000), st.integers(0, 9))
def test_each_image_is_read_once_per_epoch_over_all_ranks(ratios, world_size, run, run_bytes, seed):
    shards = MemoryShards([*ratios, [8, 16, 32] * world_size])
    for ratio in (8, 16, 32):
        epochs: list[Counter] = [Counter(), Counter(), Counter()]
        for rank in range(world_size):
            assignment = ShardAssignment(len(shards.names), world_size, seed)
            reader = make_reader(
                shards, ratio, rank=rank, assignment=assignment, max_images=run, max_bytes=run_bytes
            )
            for epoch, keys in enumerate(keys_of_epochs(reader, 3)):
                epochs[epoch].update(keys)
            reader.close()
        assert epochs == [every_key(shards.ratios, ratio)] * 3


@settings(max_examples=60, deadline=None)
@given(ratio_lists, st.integers(1, 5), st.integers(0, 60))
def test_a_reader_resumes_exactly_from_any_position(ratios, run, picks):
    shards = MemoryShards([*ratios, [8]])
    straight = make_reader(shards, 8, max_images=run)
    for _ in range(picks):
        straight.pick()
    resumed = make_reader(shards, 8, max_images=run, position=Position(*as_list(straight.position)))
    assert [resumed.pick() for _ in range(40)] == [straight.pick() for _ in range(40)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.sets(st.integers(0, 4), max_size=3), st.integers(1, 12))
def test_a_reader_resumes_if_shards_of_the_current_run_have_disappeared(picks, gone, run):
    shards = MemoryShards([[8] * 4 for _ in range(5)])
    straight = make_reader(shards, 8, max_images=run)
    for _ in range(picks):
        straight.pick()
    position = straight.position
    resumed = make_reader(Damaged(shards.ratios, gone), 8, max_images=run, position=position)
    found = [resumed.pick() for _ in range(40)]
    assert not {int(pick.key.split("-")[0]) for pick in found} & gone
    later = [pick.key for pick in found if pick.epoch == position.epoch + 1]
    left = {key for key in every_key(shards.ratios, 8) if int(key.split("-")[0]) not in gone}
    assert set(later[: len(left)]) == left


class Damaged(MemoryShards):
    """Shard set with some shards that cannot be opened."""

    def __init__(self, ratios: list[list[int]], gone: set[int]) -> None:
        super().__init__(ratios)
        self.gone = gone

    def open(self, index: int) -> MemoryShard:
        if index in self.gone:
            raise UnreadableShard("the file is missing")
        return super().open(index)


def test_each_epoch_shuffles_images_within_and_between_shards():
    shards = MemoryShards([[8] * 20 for _ in range(5)])
    first, second = keys_of_epochs(make_reader(shards, 8, max_images=30), 2)
    assert first != second
    assert sorted(first) == sorted(second)
    assert len({key.split("-")[0] for key in first[:30]}) == 2  # a run spans shards of 20
    within = [int(key.split("-")[1]) for key in first[:30]]
    assert within != sorted(within)


def test_each_run_of_each_seed_rank_and_ratio_is_shuffled_in_its_own_order():
    orders: dict[tuple, tuple[int, ...]] = {}
    for seed, rank, ratio in product((0, 1), repeat=3):
        shards = MemoryShards([[(8, 16)[ratio]] * 40])  # one shard for two ranks: 20 images each
        reader = make_reader(
            shards, (8, 16)[ratio], rank=rank, assignment=ShardAssignment(1, 2, seed), max_images=10
        )
        for epoch, keys in enumerate(keys_of_epochs(reader, 2)):
            numbers = [int(key.split("-")[1]) for key in keys]
            for run, own in enumerate((numbers[:10], numbers[10:])):
                orders[seed, rank, ratio, epoch, run] = tuple(np.argsort(own))
    assert len(orders) == 32
    assert len(set(orders.values())) == 32


def test_a_ratio_drawn_often_does_not_affect_a_ratio_drawn_rarely():
    ratios = [[8, 16, 16, 16, 32] * 4 for _ in range(6)]
    alone = make_reader(MemoryShards(ratios), 16)
    expected = [alone.pick().key for _ in range(72)]

    shards = MemoryShards(ratios)
    together = OpenShards(shards, BY_INDEX, WorkerPool(0), ProblemLog(), 4, False)
    waiting = make_reader(shards, 16, open_shards=together)
    frequent = make_reader(shards, 8, open_shards=together)
    found = [waiting.pick().key]
    for _ in range(200):  # more than eight epochs of its 24 images
        frequent.pick()
    deadline = time.monotonic() + 20
    while not waiting._next_run().done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held = sum(shards.read[key] for key in every_key(ratios, 16))
    assert held == 6  # two runs of three
    found += [waiting.pick().key for _ in range(71)]
    assert found == expected
    assert Counter(expected) == every_key(ratios, 16)


def test_readers_in_step_open_each_shard_once_per_epoch():
    shards = MemoryShards([[8, 16] * 10 for _ in range(8)])
    together = OpenShards(shards, BY_INDEX, WorkerPool(0), ProblemLog(), 4, False)
    readers = [make_reader(shards, f, open_shards=together, max_images=2) for f in (8, 16)]
    for _ in range(60):
        for reader in readers:
            reader.pick()
            reader._next_run().result()
    assert set(shards.opened.values()) == {1}


def test_a_run_ends_at_its_maximum_size_in_bytes():
    shards = MemoryShards([[8] * 10])
    reader = make_reader(shards, 8, max_images=100, max_bytes=250)  # images have 100 bytes
    runs = [reader.pick().after.run for _ in range(10)]
    assert runs == [0, 0, 1, 1, 1, 2, 2, 2, 3, 0]


def test_a_ratio_without_images_raises_an_error_with_the_reason(monkeypatch):
    monkeypatch.setattr(buffers, "MAX_EMPTY_SHARDS", 6)
    shards = MemoryShards([[16, 16], [32]])
    with pytest.raises(
        UserError, match=r"no image at 8x in 6 shards, and 0 unusable samples.*sampler\.shares"
    ):
        make_reader(shards, 8).pick()
