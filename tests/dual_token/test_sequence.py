"""Flat sequences: round trip, strict reading, and a grammar whose every walk can be read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_fast.dual_token.sequence import Grammar, Vocabulary
from cat_fast.dual_token.tokens import DualTokens
from cat_fast.errors import UserError

BOTH = Vocabulary(semantic_length=4, semantic_size=10, guide_size=20, max_side=5, offset=100)


def tokens(height=2, width=3, length=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return DualTokens(
        torch.randint(10, (length,), generator=generator),
        torch.randint(20, (height, width), generator=generator),
    )


def test_layout_and_round_trip():
    found = tokens()
    ids = BOTH.flatten(found)
    assert ids[:2] == [101, 103]
    assert ids[6:9] == [104, 105 + 1, 110 + 2]  # guide, 2 rows, 3 columns
    assert [i - 115 for i in ids[2:6]] == found.semantic.tolist()
    assert [i - 125 for i in ids[9:-1]] == found.guide.flatten().tolist()
    assert ids[-1] == 102
    assert len(ids) == len(found) + 6
    assert BOTH.parse(ids) == found
    assert len(BOTH) == 5 + 10 + 10 + 20
    assert max(ids) < BOTH.offset + len(BOTH)
    for part in (found.without_semantic(), found.without_guide()):
        assert BOTH.parse(BOTH.flatten(part)) == part


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([0, 4]), st.integers(0, 999))
def test_any_codes_survive(height, width, length, seed):
    found = tokens(height, width, length, seed)
    assert BOTH.parse(BOTH.flatten(found)) == found


@pytest.mark.parametrize("cut", range(15))
def test_a_cut_sequence_is_refused(cut):
    with pytest.raises(UserError, match=rf"cut after {cut} tokens: expected .+ next"):
        BOTH.parse(BOTH.flatten(tokens())[:cut])


@pytest.mark.parametrize(
    ("position", "token", "words"),
    [
        (0, 102, "expected the begin token, got 102 .end."),
        (3, 99, "expected 3 more semantic codes, got 99, which is outside the vocabulary 100 .. 144"),
        (3, 125, "expected 3 more semantic codes, got 125 .guide code 0."),
        (7, 110, "expected a height, got 110 .width 1."),
        (12, 102, "expected 3 more guide codes, got 102 .end."),
        (15, 130, "expected the end token, got 130 .guide code 5."),
    ],
)
def test_a_wrong_token_is_named(position, token, words):
    ids = BOTH.flatten(tokens())
    ids[position] = token
    with pytest.raises(UserError, match=f"token {position} of the sequence: {words}"):
        BOTH.parse(ids)


def test_tokens_after_the_end_are_refused():
    with pytest.raises(UserError, match="expected nothing after the end"):
        BOTH.parse([*BOTH.flatten(tokens()), 102])


@pytest.mark.parametrize(
    ("semantic", "guide", "words"),
    [
        ([1, 2, 3], [[1]], "expected 4 per image, got 3"),
        ([1, 2, 3, 10], [[1]], "semantic codes: expected 0 .. 9"),
        ([1, 2, 3, 4], [[20]], "guide codes: expected 0 .. 19"),
        ([1, 2, 3, 4], [[1]] * 6, "at most 5 rows"),
        ([1, 2, 3, -1], [[1]], "indices from 0"),
    ],
)
def test_codes_of_another_tokenizer_are_refused(semantic, guide, words):
    with pytest.raises(UserError, match=words):
        BOTH.flatten(DualTokens(torch.tensor(semantic), torch.tensor(guide)))


def test_neither_part_is_refused():
    nothing = DualTokens(torch.empty(0, dtype=torch.int64), torch.empty(0, 0, dtype=torch.int64))
    with pytest.raises(UserError, match="no codes"):
        BOTH.flatten(nothing)
    with pytest.raises(UserError, match="int64"):
        DualTokens(torch.zeros(4), torch.zeros(2, 2, dtype=torch.int64))


@settings(deadline=None, max_examples=50)
@given(st.randoms(use_true_random=False), st.sampled_from([None, [(2, 2), (4, 3)]]))
def test_every_walk_through_the_grammar_can_be_read(random, grids):
    grammar, ids = Grammar(BOTH, grids), []
    while not grammar.finished:
        token = random.choice(random.choice(grammar.allowed()))
        ids.append(token)
        grammar.advance(token)
    found = BOTH.parse(ids)
    assert BOTH.flatten(found) == ids
    if grids and found.guide.numel():
        assert found.grid in grids


def test_a_guide_alone_has_no_semantic_tokens():
    alone = Vocabulary(semantic_length=0, semantic_size=0, guide_size=20)
    ids = alone.flatten(tokens(length=0))
    assert ids[1] == alone.guide
    with pytest.raises(UserError, match=r"expected the guide, got 3 \(semantic\)"):
        alone.parse([alone.begin, alone.semantic])
    with pytest.raises(UserError, match="at least one kind"):
        Vocabulary(semantic_length=0, semantic_size=0, guide_size=0)


def test_a_complete_sequence_has_all_parts():
    grammar = Grammar(BOTH, [(2, 2)], complete=True)
    grammar.advance(BOTH.begin)
    assert grammar.allowed() == [range(BOTH.semantic, BOTH.semantic + 1)]
    grammar.advance(BOTH.semantic)
    for _ in range(BOTH.semantic_length):
        grammar.advance(BOTH.semantic_codes[0])
    assert grammar.allowed() == [range(BOTH.guide, BOTH.guide + 1)]
