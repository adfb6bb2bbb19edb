"""Codebook updates from the sums of several ranks equal those of one rank with all images."""

from types import SimpleNamespace

import pytest
import torch

from cat_fast.dual_token.codebook import VectorQuantizer
from cat_fast.training.config.dual_token import CodebookConfig
from cat_fast.training.dual_token.codebook_updates import CodebookUpdates

SIZE, DIM = 8, 3


def updates(rank, world_size, **config):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(SIZE, DIM)
    ranks = SimpleNamespace(rank=rank, world_size=world_size)
    return CodebookUpdates(quantizer, CodebookConfig(**config), "codebook", 5, ranks)


def feed(one, batches):
    for z in batches:
        one.add(z, one.quantizer.nearest(z))


@pytest.mark.parametrize("step", [0, 1])  # with revival and without
def test_two_ranks_keep_equal_codebooks(step):
    torch.manual_seed(1)
    batches = [torch.randn(2, 4, DIM) for _ in range(4)]
    ranks = [updates(rank, 2, revive_every_steps=20) for rank in range(2)]
    for rank, one in enumerate(ranks):
        feed(one, batches[2 * rank : 2 * rank + 2])
    sums = sum(one.pack(step) for one in ranks)
    assert one.counts(sums).sum() == 32
    for one in ranks:
        one.apply(step, sums, ema=SimpleNamespace(averaged={}))
    first, second = (one.quantizer.state_dict() for one in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = updates(0, 1, revive_every_steps=20)
    feed(alone, batches)
    alone.apply(step, alone.pack(step), ema=SimpleNamespace(averaged={}))
    if step:
        torch.testing.assert_close(alone.quantizer.codebook, ranks[0].quantizer.codebook)
    vectors = torch.cat(batches).flatten(0, 1)
    revived = [code for code in ranks[0].quantizer.codebook if (vectors - code).abs().sum(1).min() < 1e-6]
    assert (len(revived) >= 3) == (step == 0)


def test_no_revival_if_disabled():
    one = updates(0, 1, revive_every_steps=0)
    feed(one, [torch.randn(4, DIM)])
    assert len(one.pack(0)) == SIZE + SIZE * DIM


def test_few_vectors_revive_few_codes():
    one = updates(0, 1, revive_below=0.99)
    z = torch.randn(2, DIM) + 50
    feed(one, [z])
    one.apply(0, one.pack(0), ema=SimpleNamespace(averaged={}))
    near = [(code - z).abs().sum(1).min() < 1e-5 for code in one.quantizer.codebook]
    assert 2 <= sum(near) <= 4
    assert torch.isfinite(one.quantizer.codebook).all()
