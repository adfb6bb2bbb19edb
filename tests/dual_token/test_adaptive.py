"""The number of guide tokens from descriptions, and packed batches of mixed guide sizes."""

import pytest
import torch

from cat_fast.complexity import Description, Score
from cat_fast.dual_token.adaptive import GridThresholds, choose_grids
from cat_fast.dual_token.packed_ids import PackedIds, pack_ids
from cat_fast.errors import UserError


class Fixed:
    """A scorer with the score that the caption is."""

    name, version = "fixed", "1"

    def score_many(self, descriptions):
        return [Score(int(one.caption), float(one.caption)) for one in descriptions]


def test_grids_follow_the_scores():
    found = choose_grids([Description(str(score)) for score in range(1, 10)], scorer=Fixed())
    assert [choice.grid[0] for choice in found] == [2, 2, 4, 4, 8, 8, 8, 16, 16]
    assert [choice.score for choice in found] == list(range(1, 10))
    other = choose_grids([Description("3")], GridThresholds.parse("1, 2,3"), Fixed())
    assert other[0].grid == (8, 8)
    assert choose_grids([]) == []


def test_the_shipped_scorer_gives_complex_images_more_tokens():
    simple, rich = choose_grids(
        [
            Description("a clear blue sky"),
            Description("a newspaper page full of columns of text, tables and photographs", has_text=True),
        ]
    )
    assert simple.grid < rich.grid


@pytest.mark.parametrize("text", ["1,2", "a,b,c", "4,2,7", "1,2,10", ""])
def test_impossible_thresholds_are_refused(text):
    with pytest.raises(UserError, match="grid thresholds"):
        GridThresholds.parse(text)


def test_packed_batches_hold_every_sequence_once(tokenizer):
    torch.manual_seed(0)
    images = [torch.rand(3, 40, 40) * 2 - 1 for _ in range(6)]
    tokens = tokenizer.encode_batch(images, [2, 8, 4, 2, 4, 8])
    sequences = [tokenizer.vocabulary.flatten(own) for own in tokens]
    batches = list(pack_ids(sequences, 100))
    assert all(len(batch.ids) <= 100 for batch in batches)
    found = [own.tolist() for batch in batches for own in batch.split()]
    assert sorted(found) == sorted(sequences)
    assert all(tokenizer.vocabulary.parse(own) in tokens for own in found)
    for batch in batches:
        starts = batch.cu_seqlens[:-1].long()
        assert (batch.positions[starts] == 0).all()
        assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
    with pytest.raises(UserError):
        list(pack_ids(sequences, 10))
    with pytest.raises(UserError, match="no empty one"):
        PackedIds.of([[1], []])


def test_the_mask_is_causal_within_sequences():
    mask = PackedIds.of([[5, 6], [7, 8, 9]]).block_causal_mask()[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
