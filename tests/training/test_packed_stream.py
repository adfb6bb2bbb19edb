"""Which data which rank trains on: each once an epoch, also where a run goes on with other ranks."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_fast.data.ratio_sampler import RatioSampler, RatioSamplerConfig
from cat_fast.packing import TokenBudgetPacker
from cat_fast.training.distributed import Ranks
from cat_fast.training.packed_stream import PackedStream

SIZE, SEED = 23, 1
LENGTHS = [(64, 16, 4)[i % 3] for i in range(SIZE)]


def start(world_size: int) -> list[PackedStream]:
    return [
        PackedStream(LENGTHS, TokenBudgetPacker(96, window=6), SEED, Ranks(rank, world_size, rank))
        for rank in range(world_size)
    ]


def saved(streams: list[PackedStream]) -> list[dict]:
    """As a checkpoint holds them."""
    return [json.loads(json.dumps(stream.state_dict())) for stream in streams]


def at(place: int) -> int:
    """The latent at a place of the endless line."""
    epoch, position = divmod(place, SIZE)
    return int(np.random.default_rng([SEED, epoch]).permutation(SIZE)[position])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=4))
def test_every_latent_comes_up_once_an_epoch_whatever_the_numbers_of_ranks(runs):
    """Ranks that run on at different speeds stop, and go on as another number of ranks, several times."""
    given_out: Counter[int] = Counter()
    states: list[dict] = []
    for world_size, batches, faster in runs:
        streams = start(world_size)
        if states:
            for stream in streams:
                stream.load_state_dicts(states)
        for rank, stream in enumerate(streams):
            for _ in range(batches + faster * rank):
                given_out.update(stream.next())
        states = saved(streams)
    furthest = max(state["position"] for state in states)
    waiting = [place for state in states for _, _, place in state["packer"]["pending"]]
    unread = [p for state in states for p in range(state["position"], furthest, len(states))]
    assert given_out + Counter(map(at, waiting + unread)) == Counter(map(at, range(furthest)))


def test_what_waited_longest_comes_first_when_the_number_of_ranks_changes():
    streams = start(2)
    for _ in range(4):
        streams[0].next()  # the other rank has not begun
    states = saved(streams)
    (alone,) = start(1)
    alone.load_state_dicts(states)
    assert at(1) in alone.next()


@pytest.mark.parametrize("world_size", [1, 3])
def test_with_the_same_number_of_ranks_batches_are_those_of_a_run_without_a_break(world_size):
    straight, broken = start(world_size), start(world_size)
    for before, stream in zip(straight, broken, strict=True):
        assert [before.next() for _ in range(3)] == [stream.next() for _ in range(3)]
    resumed = start(world_size)
    states = saved(broken)
    for before, stream in zip(straight, resumed, strict=True):
        stream.load_state_dicts(states)
        assert [before.next() for _ in range(9)] == [stream.next() for _ in range(9)]


def test_the_ratio_sampler_goes_on_through_the_pictures_with_another_number_of_ranks():
    ratios = [(8, 16, 32)[i % 3] for i in range(90)]
    given_out: Counter[int] = Counter()
    state = None
    for world_size in (2, 3, 1):
        sampler = RatioSampler(ratios, 2, world_size, SEED, RatioSamplerConfig())
        if state is not None:
            sampler.load_state_dict(state)
        for _ in range(4):
            for batch in sampler.plan():
                assert {ratios[i] for i in batch.indices} == {batch.ratio}
                given_out.update(batch.indices)
        state = json.loads(json.dumps(sampler.state_dict()))
    assert given_out.total() == 4 * 2 * (2 + 3 + 1)
    # No pool of 30 was gone through, so no picture came up again.
    assert set(given_out.values()) == {1}
