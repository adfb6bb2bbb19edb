"""Each latent is used once per epoch, also if a run resumes on another number of ranks."""

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
    """Return the state in a checkpoint, which is equal on all ranks."""
    first, *others = (stream.state_dict() for stream in streams)
    assert all(other == first for other in others)
    return json.loads(json.dumps(first))


def at(place: int) -> int:
    """Return the latent at a position in the concatenated epochs."""
    epoch, position = divmod(place, SIZE)
    return int(np.random.default_rng([SEED, epoch]).permutation(SIZE)[position])


@pytest.mark.parametrize("lengths", [LENGTHS[:-1], [*LENGTHS, 4], [LENGTHS[1], LENGTHS[0], *LENGTHS[2:]]])
def test_state_of_other_latents_is_refused(lengths):
    """Positions in the epoch of one dataset do not apply to another."""
    (stream,) = start(1)
    stream.next()
    other = PackedStream(lengths, 96, 6, SEED, Ranks())
    with pytest.raises(UserError, match=rf"expected the {SIZE} latents .* got {len(lengths)}"):
        other.load_state_dict(stream.state_dict())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=4))
def test_every_latent_is_used_once_per_epoch_on_changing_numbers_of_ranks(runs):
    """Runs stop and resume several times, each time on another number of ranks."""
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


def test_oldest_pending_latent_comes_first_when_the_number_of_ranks_changes():
    streams = start(3)
    for stream in streams:
        stream.next()
    state = saved(streams)
    oldest = min(place for _, _, place in state["packer"]["pending"])
    (alone,) = start(1, state)
    assert at(oldest) in alone.next()


@pytest.mark.parametrize("world_size", [1, 3])
def test_resuming_on_the_same_number_of_ranks_yields_the_same_batches(world_size):
    straight, broken = start(world_size), start(world_size)
    for before, stream in zip(straight, broken, strict=True):
        assert [before.next() for _ in range(3)] == [stream.next() for _ in range(3)]
    resumed = start(world_size, saved(broken))
    for before, stream in zip(straight, resumed, strict=True):
        assert [before.next() for _ in range(9)] == [stream.next() for _ in range(9)]


def test_state_of_another_budget_is_refused():
    (stream,) = start(1)
    other = PackedStream(LENGTHS, 97, 6, SEED, Ranks())
    with pytest.raises(UserError, match="expected a state saved with"):
        other.load_state_dict(stream.state_dict())
