"""No two purposes of a run draw from the same stream of random numbers."""

from itertools import combinations, product

import numpy as np
import pytest

from cat_fast.data.sampling.balanced_plan import BalancedPlan
from cat_fast.data.sampling.cost_table import Cost, CostTable
from cat_fast.data.sampling.step_plan import PerRankPlan
from cat_fast.data.streams.buffers import Position
from cat_fast.data.streams.decoding import crop_seed
from cat_fast.data.streams.shard_assignment import ShardAssignment
from cat_fast.training.generator.packed_stream import PackedStream
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.seeding import seed_step
from tests.data.streams.sets import MemoryShards, make_reader

SEED, SMALL = 3, range(4)
MIX = {8: 1, 16: 2}
COSTS = CostTable(costs={8: Cost(0, 2), 16: Cost(0, 1)})


def plan_steps():
    for step in SMALL:
        PerRankPlan(MIX, 2, 4, SEED).plan(step, {})


def plan_balanced_steps():
    for step in SMALL:
        BalancedPlan(MIX, 2, 4, SEED, COSTS).plan(step, {})


def assign_shards():
    for epoch in SMALL:
        ShardAssignment(4, 2, SEED).rank_shards(8, epoch, 0)


def shuffle_runs():
    for rank in SMALL:
        reader = make_reader(MemoryShards([[8]]), 8, rank=rank, assignment=ShardAssignment(4, 4, SEED))
        for epoch, run in product(SMALL, SMALL):  # the method alone, as reading also assigns shards
            reader._shuffled(Position(epoch, run=run), [], Position(), 0)


def crop_images():
    for epoch in SMALL:
        np.random.default_rng(crop_seed(SEED, epoch, 8, "a"))


def pack_latents():
    stream = PackedStream([4] * 8, 8, 4, SEED, Ranks())
    for _ in range(16):
        stream.next()


def seed_steps():
    for step, rank in product(SMALL, SMALL):
        seed_step(SEED, step, rank)


@pytest.fixture
def seeds_of(monkeypatch):
    """Function that returns the seeds that another one uses, padded with zeros as NumPy pads them."""
    used = set()
    for name in ("default_rng", "SeedSequence"):
        real = getattr(np.random, name)

        def recording(seed, real=real):
            used.add((*seed, *[0] * (8 - len(seed))))
            return real(seed)

        monkeypatch.setattr(np.random, name, recording)

    def run(draw):
        used.clear()
        draw()
        return set(used)

    return run


@pytest.mark.parametrize(
    "purposes",
    [
        (plan_steps, assign_shards, shuffle_runs, crop_images, seed_steps),
        (plan_balanced_steps, assign_shards, shuffle_runs, crop_images, seed_steps),
        (pack_latents, seed_steps),
    ],
    ids=["tokenizer", "balanced", "generator"],
)
def test_purposes_of_a_run_share_no_stream(purposes, seeds_of):
    seeds = {purpose.__name__: seeds_of(purpose) for purpose in purposes}
    assert min(map(len, seeds.values())) >= 3
    for one, other in combinations(seeds, 2):
        assert not seeds[one] & seeds[other], f"{one} and {other}"
