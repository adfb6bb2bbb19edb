"""Cached states of texts are those of a fresh encoder to the bit, within a bounded memory."""

import pytest
import torch

from cat_fast.generator.text_cache import TextCache, estimate_bytes
from cat_fast.generator.text_encoder import TextEncoder
from tests.inference.tiny_encoder import WIDTH, save_encoder

TEXTS = ["a red house", "sky", "", "a newspaper page a newspaper page", "a blue sky", "sky"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return TextEncoder(save_encoder(tmp_path_factory.mktemp("encoder")))


class Counting:
    """A text encoder that keeps what it was asked to encode."""

    def __init__(self, encoder):
        self.encoder, self.model, self.asked = encoder, encoder.model, []

    def __call__(self, texts):
        self.asked += texts
        return self.encoder(texts)


def alone(encoder, texts):
    return [encoder([text]).tokens for text in texts]


@pytest.mark.parametrize("max_bytes", [1 << 20, 500, 0])
def test_states_are_those_of_each_text_alone_whatever_came_before(encoder, max_bytes):
    cache = TextCache(encoder, max_bytes)
    for texts in (TEXTS, TEXTS[::-1], TEXTS[3:], ["sky"], TEXTS):
        packed = cache(texts)
        expected = alone(encoder, texts)
        assert packed.cu_seqlens.diff().tolist() == [len(states) for states in expected]
        assert torch.equal(packed.tokens, torch.cat(expected))
        assert packed.max_seqlen == max(map(len, expected))
        assert cache.bytes <= max_bytes
    # A batch changes no more than rounding.
    torch.testing.assert_close(packed.tokens, encoder(TEXTS).tokens)


def test_each_distinct_text_is_encoded_once(encoder):
    counting = Counting(encoder)
    cache = TextCache(counting, 1 << 20)
    for _ in range(3):
        cache(TEXTS)
    assert counting.asked == list(dict.fromkeys(TEXTS))
    assert cache.bytes == sum(states.nbytes for states in alone(encoder, dict.fromkeys(TEXTS)))


def test_the_texts_used_longest_ago_are_dropped(encoder):
    counting = Counting(encoder)
    sizes = [states.nbytes for states in alone(encoder, ["sky", "page", "house"])]
    cache = TextCache(counting, sizes[0] + sizes[1])
    for text in ("sky", "page", "sky", "house", "sky", "page"):
        cache([text])
    assert counting.asked == ["sky", "page", "house", "page"]


def test_the_size_of_all_states_is_estimated_by_their_tokens(encoder):
    lengths = [len(states) for states in alone(encoder, TEXTS)]
    assert encoder.count_tokens(TEXTS) == lengths
    assert estimate_bytes(encoder, len(TEXTS), TEXTS) == sum(lengths) * WIDTH * 4
    assert estimate_bytes(encoder, 10_000, ["sky"]) == 10_000 * lengths[1] * WIDTH * 4
