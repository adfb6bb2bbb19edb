"""The language model: packed losses, causality, sampling by the grammar, counts."""

import math

import numpy as np
import pytest
import torch

from cat_fast.dual_token.language.counts import Counts
from cat_fast.dual_token.language.generate import read_captions
from cat_fast.dual_token.language.model import DualLanguageModel
from cat_fast.dual_token.language.sampling import sample
from cat_fast.dual_token.sequence import Grammar, Vocabulary
from cat_fast.dual_token.tokens import DualTokens
from cat_fast.errors import UserError

VOCABULARY = Vocabulary(semantic_length=3, semantic_size=6, guide_size=9, max_side=4)
WIDTH = 7


def tiny_language(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(VOCABULARY), "hidden_size": 16, "intermediate_size": 24, "num_layers": 2,
        "num_heads": 2, "text_width": WIDTH, "max_length": 64,
    }  # fmt: skip
    model = DualLanguageModel(**(settings | changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn_like(parameter) * 0.3
    return model


def examples(count=3):
    generator = torch.Generator().manual_seed(1)
    sequences, texts = [], []
    for i in range(count):
        tokens = DualTokens(
            torch.randint(6, (3,), generator=generator), torch.randint(9, (1 + i, 2), generator=generator)
        )
        sequences.append(VOCABULARY.flatten(tokens))
        texts.append(torch.randn(i, WIDTH, generator=generator))  # the first has no caption
    return sequences, texts


def test_a_packs_losses_are_those_of_its_sequences_one_by_one():
    model, (sequences, texts) = tiny_language(), examples()
    packed = model(sequences, texts)
    assert packed.targets.tolist() == [token for sequence in sequences for token in sequence[1:]]
    start = 0
    for number, (sequence, text) in enumerate(zip(sequences, texts, strict=True)):
        alone = model([sequence], [text])
        own = packed.losses[packed.owners == number]
        torch.testing.assert_close(own, alone.losses, rtol=1e-4, atol=1e-5)
        start += len(sequence) - 1
    assert start == len(packed.losses)


def test_losses_are_those_of_llama_with_its_own_causal_mask():
    model, (sequences, texts) = tiny_language(), examples()
    sequence, text = sequences[2], texts[2]
    embedded = torch.cat([model.prefix(text), model.llama.embed_tokens(torch.tensor(sequence))])
    hidden = model.llama(inputs_embeds=embedded[None]).last_hidden_state[0]
    logits = model.head(hidden[len(text) : -1])
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(sequence[1:]), reduction="none")
    torch.testing.assert_close(model([sequence], [text]).losses, expected, rtol=1e-4, atol=1e-5)


def test_losses_depend_on_the_caption_and_not_on_later_ids():
    model, (sequences, texts) = tiny_language(), examples()
    before = model(sequences, texts).losses
    other = [texts[0], -texts[1], texts[2]]
    after = model(sequences, other)
    changed = (after.losses - before).abs() > 1e-5
    assert changed[after.owners == 1].any()
    assert not changed[after.owners != 1].any()
    late = [list(sequence) for sequence in sequences]
    late[0][-2] = VOCABULARY.guide_codes[0] if late[0][-2] != VOCABULARY.guide_codes[0] else VOCABULARY.pad
    found = model(late, texts)
    first = found.owners == 0
    torch.testing.assert_close(found.losses[first][:-2], before[first][:-2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_every_sample_decodes(seed):
    model, (_, texts) = tiny_language(), examples()
    ids = sample(model, VOCABULARY, texts[2], seed, grids=[(2, 2), (1, 3)])
    tokens = VOCABULARY.parse(ids)
    assert VOCABULARY.flatten(tokens) == ids
    assert len(tokens.semantic) == 3
    assert tokens.grid in ((2, 2), (1, 3))
    assert sample(model, VOCABULARY, texts[2], seed, grids=[(2, 2), (1, 3)]) == ids


def test_the_most_probable_sequence_is_that_of_the_uncached_model():
    model, (_, texts) = tiny_language(), examples()
    grids = [(2, 2)]
    ids = sample(model, VOCABULARY, texts[1], 0, grids=grids, temperature=0)
    grammar, expected = Grammar(VOCABULARY, grids, complete=True), []
    while not grammar.finished:
        allowed = [token for part in grammar.allowed() for token in part]
        if expected:
            embedded = torch.cat([model.prefix(texts[1]), model.llama.embed_tokens(torch.tensor(expected))])
            logits = model.head(model.llama(inputs_embeds=embedded[None]).last_hidden_state[0, -1])
            token = max(allowed, key=lambda one: logits[one].item())
        else:
            token = VOCABULARY.begin
        expected.append(token)
        grammar.advance(token)
    assert ids == expected


def test_impossible_sampling_is_refused():
    model = tiny_language()
    text = torch.zeros(0, WIDTH)
    with pytest.raises(UserError, match="expected a vocabulary of"):
        sample(model, Vocabulary(semantic_length=0, semantic_size=0, guide_size=9), text, 0)
    for temperature in (-1, math.nan, math.inf):
        with pytest.raises(UserError, match=f"temperature: .* got {temperature}"):
            sample(model, VOCABULARY, text, 0, temperature=temperature)
    with pytest.raises(UserError, match="top_k: expected 0 or more, got -1"):
        sample(model, VOCABULARY, text, 0, top_k=-1)
    alone = Vocabulary(semantic_length=0, semantic_size=0, guide_size=9, max_side=4)
    small = tiny_language(vocab_size=len(alone), max_length=6)
    with pytest.raises(UserError, match="limited to 6 ids"):
        sample(small, alone, text, 0, grids=[(4, 4)])


def test_save_and_load(tmp_path):
    model, (sequences, texts) = tiny_language(), examples()
    model.save_pretrained(tmp_path)
    loaded = DualLanguageModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(sequences, texts).losses, model(sequences, texts).losses)


def test_counts():
    counts = Counts([[0, 1, 2], [0, 1, 1]], 4)
    assert counts.single.tolist() == [0, 3, 1, 0]
    found = counts.unigram_bits([0, 1, 2], 0.0)
    np.testing.assert_allclose(found, [-math.log2(3 / 4), -math.log2(1 / 4)])
    found = counts.bigram_bits([0, 1, 2], 1.0)
    np.testing.assert_allclose(found, [-math.log2(3 / 6), -math.log2(2 / 6)])
    best = counts.best_bits([[0, 1, 1]], "bigram")
    assert best[0].sum() <= counts.bigram_bits([0, 1, 1], 1.0).sum()


@pytest.mark.parametrize("name", ["captions.txt", "captions.jsonl"])
def test_captions_may_follow_a_byte_order_mark_and_contain_line_separators(tmp_path, name):
    captions = ["a red\u2028house", "a blue\x85sky"]
    lines = captions if name.endswith(".txt") else [f'{{"caption": "{one}"}}' for one in captions]
    (tmp_path / name).write_bytes("\ufeff".encode() + "\r\n\n".join(lines).encode())
    assert read_captions(tmp_path / name) == captions
