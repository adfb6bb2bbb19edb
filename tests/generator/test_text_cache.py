"""`TextCache` returns bit-identical states to a fresh encoder, within its memory limit."""

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
    """Text encoder that records its inputs."""

    def __init__(self, encoder):
        self.encoder, self.model, self.encoded = encoder, encoder.model, []

    def __call__(self, texts):
        self.encoded += texts
        return self.encoder(texts)


def alone(encoder, texts):
    return [encoder([text]).tokens for text in texts]


@pytest.mark.parametrize("max_bytes", [1 << 20, 500, 0])
def test_states_equal_those_of_each_text_encoded_alone(encoder, max_bytes):
    cache = TextCache(encoder, max_bytes)
    for texts in (TEXTS, TEXTS[::-1], TEXTS[3:], ["sky"], TEXTS):
        packed = cache(texts)
        expected = alone(encoder, texts)
        assert packed.cu_seqlens.diff().tolist() == [len(states) for states in expected]
        assert torch.equal(packed.tokens, torch.cat(expected))
        assert packed.max_seqlen == max(map(len, expected))
        assert cache.bytes <= max_bytes
    # Encoding in a batch differs only by rounding.
    torch.testing.assert_close(packed.tokens, encoder(TEXTS).tokens)


def test_each_distinct_text_is_encoded_once(encoder):
    counting = Counting(encoder)
    cache = TextCache(counting, 1 << 20)
    for _ in range(3):
        cache(TEXTS)
    assert counting.encoded == list(dict.fromkeys(TEXTS))
    assert cache.bytes == sum(states.nbytes for states in alone(encoder, dict.fromkeys(TEXTS)))


def test_least_recently_used_texts_are_dropped(encoder):
    counting = Counting(encoder)
    sizes = [states.nbytes for states in alone(encoder, ["sky", "page", "house"])]
    cache = TextCache(counting, sizes[0] + sizes[1])
    for text in ("sky", "page", "sky", "house", "sky", "page"):
        cache([text])
    assert counting.encoded == ["sky", "page", "house", "page"]


def test_size_estimate_is_proportional_to_the_number_of_tokens(encoder):
    lengths = [len(states) for states in alone(encoder, TEXTS)]
    assert encoder.count_tokens(TEXTS) == lengths
    assert estimate_bytes(encoder, len(TEXTS), TEXTS) == sum(lengths) * WIDTH * 4
    assert estimate_bytes(encoder, 10_000, ["sky"]) == 10_000 * lengths[1] * WIDTH * 4
