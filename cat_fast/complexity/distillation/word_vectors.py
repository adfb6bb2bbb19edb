"""Pretrained vectors of single words: the sentence encoder's embeddings, reduced to their main directions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cat_fast.complexity.scorers.fast.words import split_words
from cat_fast.complexity.sentence_encoder import SentenceEncoder

SIZE = 128
"""Number of directions that are kept."""
_BATCH = 128


@dataclass(frozen=True)
class WordVectors:
    """Pretrained vectors of words."""

    words: tuple[str, ...]
    vectors: np.ndarray
    """float32 (words, SIZE), unit variance."""
    general: int
    """The first words, which belong to any vocabulary; others only to that of captions with them."""


def word_vectors(
    encoder: SentenceEncoder,
    captions: Sequence[str],
    on_word: Callable[[int, int], None] = lambda done, total: None,
) -> WordVectors:
    """Return the vectors of the encoder's whole words and of all words of captions.

    Args:
        encoder: the sentence encoder.
        captions: captions whose words get vectors, too.
        on_word: is called with the number of finished words and of all words.
    """
    general = sorted(word for word in encoder.tokenizer.get_vocab() if word.isascii() and word.isalpha())
    others = sorted({word for caption in captions for word in split_words(caption)} - set(general))
    words = [*general, *others]
    embedded = np.zeros((len(words), encoder.width), np.float32)
    order = sorted(range(len(words)), key=lambda i: len(words[i]))
    for first in range(0, len(words), _BATCH):
        chosen = order[first : first + _BATCH]
        embedded[chosen] = _embed(encoder, [words[i] for i in chosen])
        on_word(first + len(chosen), len(words))
    embedded /= np.linalg.norm(embedded, axis=1, keepdims=True)
    embedded -= embedded.mean(0)
    variance, directions = np.linalg.eigh(embedded.T.astype(np.float64) @ embedded)
    vectors = embedded @ directions[:, np.argsort(-variance)[:SIZE]]
    return WordVectors(tuple(words), (vectors / vectors.std()).astype(np.float32), len(general))


@torch.no_grad()
def _embed(encoder: SentenceEncoder, words: Sequence[str]) -> np.ndarray:
    """Return the mean state of each word's tokens after the last layer, float32 (words, 384)."""
    tokens = encoder.tokens(words)
    ids = torch.zeros(len(words), max(map(len, tokens)), dtype=torch.int64)
    for row, own in enumerate(tokens):
        ids[row, : len(own)] = torch.tensor(own)
    real = torch.arange(ids.shape[1]) < torch.tensor([[len(own)] for own in tokens])
    states = encoder.embed(ids)
    for layer in encoder.layers:
        states = layer(states, real)
    weights = real.float()
    return ((states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)).numpy()
