"""No two purposes of a run draw from the same stream of random numbers."""

from functools import partial
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cat_fast.data.sampling.balanced_plan import BalancedPlan
from cat_fast.data.sampling.cost_table import Cost, CostTable
from cat_fast.data.sampling.step_plan import PerRankPlan
from cat_fast.data.streams.buffers import Position
from cat_fast.data.streams.decoding import crop_seed
from cat_fast.data.streams.shard_assignment import ShardAssignment
from cat_fast.dual_token.codebook import VectorQuantizer
from cat_fast.training.config.dual_token import CodebookConfig, LanguageDataConfig, PairDataConfig
from cat_fast.training.dual_token import encoded_pairs, pairs
from cat_fast.training.dual_token.codebook_updates import CodebookUpdates
from cat_fast.training.dual_token.encoded_pairs import encode_pairs
from cat_fast.training.dual_token.guide_task import GuideTask
from cat_fast.training.dual_token.language_task import LanguageTask
from cat_fast.training.generator.packed_stream import PackedStream
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.seeding import seed_step
from tests.data.streams.sets import MemoryShards, make_reader

SEED, SMALL = 3, range(4)
MIX = {8: 1, 16: 2}
PAIRS = PairDataConfig(index="pairs.jsonl", held_out="held_out.jsonl", image_size=4, batch_size=2)
RECORDS = [SimpleNamespace(key=str(number), path="", caption=str(number)) for number in range(4)]
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


def draw_grids():
    task = SimpleNamespace(config=SimpleNamespace(seed=SEED), grids=[(2, 2), (4, 4)])
    for step in SMALL:
        GuideTask.grid_of(task, step)


def sample_candidates():
    revive_codes(lambda one, step: one.pack(step))


def order_candidates():
    size = 4
    found = torch.ones(size + 2 * size + 2 * size, dtype=torch.float64)
    revive_codes(lambda one, step: one.apply(step, found, SimpleNamespace(averaged={})))


def revive_codes(draw):
    for step, rank in product(SMALL, SMALL):
        ranks = SimpleNamespace(rank=rank, world_size=4)
        quantizer = VectorQuantizer(4, 2)
        one = CodebookUpdates(quantizer, CodebookConfig(revive_every_steps=1), "codebook", SEED, ranks)
        one.add(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))
        draw(one, step)


def read_pairs():
    """Draw the order of indexed pairs and their crops."""
    source = pairs.IndexedPairs(PAIRS, SEED, Ranks())
    for step in range(8):
        source.batch(step)


def choose_held_out_pairs():
    for count in range(1, 5):
        pairs.held_out_pairs(PAIRS, count)


def draw_sequences():
    data = SimpleNamespace(batch_size=2, caption_dropout=0.5)
    task = SimpleNamespace(config=SimpleNamespace(data=data, seed=SEED), ranks=Ranks())
    task.pairs = [SimpleNamespace(key=str(number), caption="", ids=[0]) for number in range(4)]
    task.target = SimpleNamespace(states=lambda captions: [torch.zeros(1, 1)] * len(captions))
    for step in range(8):
        LanguageTask.draw(task, step)


def encode_sequences(tmp_path, monkeypatch):
    tokenizer = SimpleNamespace(fingerprint=lambda: "", max_side=64)
    monkeypatch.setattr(encoded_pairs, "read_pairs", lambda index, key: [])
    config = LanguageDataConfig()
    return {
        key: partial(encode_pairs, tmp_path / key, "index", key, tokenizer, config, SEED, Ranks())
        for key in encoded_pairs.STREAMS
    }


@pytest.fixture(autouse=True)
def pairs_in_memory(monkeypatch):
    monkeypatch.setattr(pairs, "read_pairs", lambda index, key: RECORDS)
    monkeypatch.setattr(pairs, "load_image", lambda path: Image.new("RGB", (6, 4)))


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
        (
            plan_steps,
            assign_shards,
            shuffle_runs,
            crop_images,
            draw_grids,
            sample_candidates,
            order_candidates,
        ),
        (read_pairs, choose_held_out_pairs, sample_candidates, order_candidates, seed_steps),
        (
            plan_steps,
            assign_shards,
            shuffle_runs,
            crop_images,
            choose_held_out_pairs,
            sample_candidates,
            order_candidates,
            seed_steps,
        ),
    ],
    ids=["tokenizer", "balanced", "generator", "guide", "indexed pairs", "streamed pairs"],
)
def test_purposes_of_a_run_share_no_stream(purposes, seeds_of):
    seeds = {purpose.__name__: seeds_of(purpose) for purpose in purposes}
    assert min(map(len, seeds.values())) >= 3
    for one, other in combinations(seeds, 2):
        assert not seeds[one] & seeds[other], f"{one} and {other}"


def test_the_language_model_shares_no_stream(seeds_of, tmp_path, monkeypatch):
    seeds = {"draw": seeds_of(draw_sequences)}
    assert {seed[3] for seed in seeds["draw"]} == {12, 13}  # order and dropout
    for key, encode in encode_sequences(tmp_path, monkeypatch).items():
        seeds[key] = seeds_of(encode)
        assert len(seeds[key]) == 1
    for one, other in combinations(seeds, 2):
        assert not seeds[one] & seeds[other], f"{one} and {other}"
