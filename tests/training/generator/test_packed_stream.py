"""Which data which rank trains on: each once an epoch, also where a run goes on with other ranks."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_fast.errors import UserError
from cat_fast.training.generator.packed_stream import PackedStream
from cat_fast.training.runtime.ranks import Ranks

SIZE, SEED = 23, 1
LENGTHS = [(64, 16, 4)[i % 3] for i in range(SIZE)]


def start(world_size: int, state: dict | None = None) -> list[PackedStream]:
    streams = [
        PackedStream(LENGTHS, 96, 6, SEED, Ranks(rank, world_size, rank)) for rank in range(world_size)
    ]
    for stream in streams:
        if state is not None:
            stream.load_state_dict(state)
    return streams


def saved(streams: list[PackedStream]) -> dict:
    """As a checkpoint holds it: one state, which is that of every rank."""
    first, *others = (stream.state_dict() for stream in streams)
    assert all(other == first for other in others)
    return json.loads(json.dumps(first))


def at(place: int) -> int:
    """The latent at a place of the endless line."""
    epoch, position = divmod(place, SIZE)
    return int(np.random.default_rng([SEED, epoch]).permutation(SIZE)[position])


@pytest.mark.parametrize("lengths", [LENGTHS[:-1], [*LENGTHS, 4], [LENGTHS[1], LENGTHS[0], *LENGTHS[2:]]])
def test_a_run_goes_on_with_its_own_latents_only(lengths):
    """Another set would be read from the middle of its epoch on, under the places of the first."""
    (stream,) = start(1)
    stream.next()
    other = PackedStream(lengths, 96, 6, SEED, Ranks())
    with pytest.raises(UserError, match=rf"began on {SIZE} latents, and there are {len(lengths)}"):
        other.load_state_dict(stream.state_dict())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=4))
def test_every_latent_comes_up_once_an_epoch_whatever_the_numbers_of_ranks(runs):
    """Runs stop, and go on as another number of ranks, several times."""
    given_out: Counter[int] = Counter()
    state = None
    for world_size, steps in runs:
        streams = start(world_size, state)
        for stream in streams:
            for _ in range(steps):
                batch = stream.next()
                assert 0 < sum(LENGTHS[i] for i in batch) <= 96
                given_out.update(batch)
        state = saved(streams)
    waiting = [place for _, _, place in state["packer"]["pending"]]
    assert given_out + Counter(map(at, waiting)) == Counter(map(at, range(state["position"])))


def test_what_waited_longest_comes_first_when_the_number_of_ranks_changes():
    streams = start(3)
    for stream in streams:
        stream.next()
    state = saved(streams)
    oldest = min(place for _, _, place in state["packer"]["pending"])
    (alone,) = start(1, state)
    assert at(oldest) in alone.next()


@pytest.mark.parametrize("world_size", [1, 3])
def test_with_the_same_number_of_ranks_batches_are_those_of_a_run_without_a_break(world_size):
    straight, broken = start(world_size), start(world_size)
    for before, stream in zip(straight, broken, strict=True):
        assert [before.next() for _ in range(3)] == [stream.next() for _ in range(3)]
    resumed = start(world_size, saved(broken))
    for before, stream in zip(straight, resumed, strict=True):
        assert [before.next() for _ in range(9)] == [stream.next() for _ in range(9)]


def test_a_run_with_another_budget_does_not_go_on():
    (stream,) = start(1)
    other = PackedStream(LENGTHS, 97, 6, SEED, Ranks())
    with pytest.raises(UserError, match="expected a state saved with"):
        other.load_state_dict(stream.state_dict())
