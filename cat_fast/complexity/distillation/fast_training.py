"""Training of the fast scorer's network with torch, and its conversion to integers.

The model mirrors `cat_fast.complexity.scorers.fast.network.Network`: same inputs, same flat layout of many
captions. A word's vector is a projection of its pretrained vector plus, for words of the captions that are
fitted to, a learned difference.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cat_fast.complexity.description import Description
from cat_fast.complexity.distillation.word_vectors import WordVectors
from cat_fast.complexity.rated_captions import RatedCaption
from cat_fast.complexity.scorers.fast.network import FLAGS, WINDOW, Network
from cat_fast.complexity.scorers.fast.words import (
    FIRST_WORD,
    PROPERTIES,
    SEPARATOR,
    UNKNOWN,
    FlatWords,
    Vocabulary,
    split_words,
    word_properties,
)

VECTOR, CHANNELS, HIDDEN = 32, 32, 32
SINGLE_WEIGHT = 0.7
"""Weight of a caption with one rating; two ratings have weight 1."""
_MIDDLE = 5.2
_LARGEST_IMPORTANCE = 6.0


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a fit."""

    epochs: int = 20
    word_dropout: float = 0.3
    """Largest share of a caption's words that become unknown; the share is drawn per caption."""
    dropout: float = 0.2
    batch: int = 128
    rate: float = 4e-3
    decay: float = 1e-2
    """Weight decay; five times as much for the terms of single words and pairs."""
    flag_loss: float = 0.3
    """Weight of predicting the flags from the caption, which helps where they are unknown."""


def vocabulary_of(captions: Sequence[str], pretrained: WordVectors) -> tuple[Vocabulary, int]:
    """Return the vocabulary of captions and the number of their own words, which come first."""
    split = [split_words(caption) for caption in captions]
    counts = Counter(word for words in split for word in words)
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    pairs = {pair for words in split for pair in pairwise(words)}
    others = [word for word in pretrained.words[: pretrained.general] if word not in counts]
    return Vocabulary.of([*ordered, *others], pairs), len(ordered)


class FastModel(nn.Module):
    """The network in floating point."""

    def __init__(self, vocabulary: Vocabulary, own: int, pretrained: WordVectors) -> None:
        super().__init__()
        size, learned = pretrained.vectors.shape[1], FIRST_WORD + own
        row = {word: i for i, word in enumerate(pretrained.words)}
        base = np.zeros((vocabulary.size, size), np.float32)
        for i, word in enumerate(vocabulary.words, FIRST_WORD):
            if word in row:
                base[i] = pretrained.vectors[row[word]]
        indices = np.arange(vocabulary.size)
        self.base = torch.from_numpy(base)
        self.properties = torch.from_numpy(word_properties(vocabulary.words)).float()
        self.learned = torch.from_numpy(np.where(indices < learned, indices, UNKNOWN))
        self.projection = nn.Linear(size, VECTOR, bias=False)
        self.difference = nn.Embedding(learned, VECTOR + 1)  # and the linear term
        self.pair_terms = nn.Embedding(len(vocabulary.pairs) + 1, 1, padding_idx=0)
        nn.init.normal_(self.projection.weight, std=0.3 / math.sqrt(size))
        nn.init.zeros_(self.difference.weight)
        nn.init.zeros_(self.pair_terms.weight)
        self.importance = nn.Linear(VECTOR, 1)
        self.convolution = nn.Linear(WINDOW * VECTOR, CHANNELS)
        features = 2 * VECTOR + 2 * CHANNELS + len(PROPERTIES) + 2
        self.hidden_1 = nn.Linear(features + FLAGS, HIDDEN)
        self.hidden_2 = nn.Linear(HIDDEN, HIDDEN)
        self.output = nn.Linear(features + FLAGS + HIDDEN, 1)
        self.flags = nn.Linear(features, 2)

    def word_table(self) -> tuple[Tensor, Tensor]:
        """Return vectors (V, VECTOR) and linear terms (V, 1) of all indices; the separator's are 0."""
        return self._words(torch.arange(len(self.base)))

    def forward(self, text: FlatWords, flags: Tensor, settings: TrainingSettings) -> tuple[Tensor, Tensor]:
        """Return the expected scores (N,) and the log-odds of the flags (N, 2).

        Args:
            text: words of N captions.
            flags: has_text and has_faces as -1, 0 (unknown) or 1, (N, 2).
            settings: rates of dropout, which apply in training mode.
        """
        words, pairs = torch.from_numpy(text.words), torch.from_numpy(text.pairs)
        owner = torch.from_numpy(text.captions)
        count = len(text.starts)
        lengths = torch.from_numpy(np.maximum(text.lengths, 1)).float()[:, None]
        root = lengths.sqrt()
        real = (words != SEPARATOR)[:, None].float()
        if self.training:
            share = torch.rand(count)[owner] * settings.word_dropout
            dropped = (torch.rand(len(words)) < share) & (real[:, 0] > 0)
            words = torch.where(dropped, UNKNOWN, words)
            pairs = torch.where(dropped | dropped.roll(-1), 0, pairs)

        def total(values: Tensor) -> Tensor:
            return torch.zeros(count, values.shape[1]).index_add(0, owner, values)

        vectors, terms = self._words(words)
        around = functional.pad(vectors, (0, 0, 1, 1))
        windows = torch.cat([around[:-2], vectors, around[2:]], 1)
        convolved = functional.relu(self.convolution(windows)) * real
        largest = torch.zeros(count, CHANNELS).scatter_reduce(
            0, owner[:, None].expand_as(convolved), convolved, "amax"
        )
        importance = self.importances(vectors) * real
        pooled = torch.cat(
            [
                total(vectors) / (2 * root),
                largest,
                total(convolved) / (2 * root),
                total(importance * vectors) / (total(importance) + 1e-6),
                total(self.properties[words]) / 2,
            ],
            1,
        )
        pooled = functional.dropout(pooled, settings.dropout, self.training)
        features = torch.cat([pooled, 4 * lengths / (lengths + 12) - 2, root / 4 - 1], 1)
        inputs = torch.cat([features, flags, flags.abs(), flags[:, :1] * flags[:, 1:]], 1)
        hidden = _activate(self.hidden_1(inputs))
        hidden = functional.dropout(hidden, settings.dropout, self.training)
        hidden = _activate(self.hidden_2(hidden))
        linear = total(terms + self.pair_terms(pairs)) / root
        expected = self.output(torch.cat([inputs, hidden], 1)) + linear + _MIDDLE
        return expected[:, 0], self.flags(features)

    def importances(self, vectors: Tensor) -> Tensor:
        """Return the weight of each word in the weighted mean, (words, 1)."""
        return self.importance(vectors).clamp(-_LARGEST_IMPORTANCE, _LARGEST_IMPORTANCE).exp()

    def _words(self, words: Tensor) -> tuple[Tensor, Tensor]:
        real = (words != SEPARATOR)[:, None].float()
        learned = self.difference(self.learned[words]) * real
        return self.projection(self.base[words]) * real + learned[:, :VECTOR], learned[:, VECTOR:]


def _activate(x: Tensor) -> Tensor:
    return x * (0.5 + 0.5 * x / torch.sqrt(1 + x * x))


def train_network(
    rated: Sequence[RatedCaption],
    vocabulary: Vocabulary,
    own: int,
    pretrained: WordVectors,
    settings: TrainingSettings,
    seed: int,
    on_epoch: Callable[[], None] = lambda: None,
) -> Network:
    """Fit a network to rated captions; the same arguments give the same network on one machine.

    Args:
        rated: the captions.
        vocabulary, own: see `vocabulary_of`.
        pretrained: vectors of words.
        settings: settings of the fit.
        seed: seed of the initial weights, the order of captions and dropout.
        on_epoch: is called after each epoch.
    """
    captions = [row.description.caption for row in rated]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FastModel(vocabulary, own, pretrained).train()
        means = torch.tensor([row.mean for row in rated])
        weights = torch.tensor([1.0 if len(row.ratings) > 1 else SINGLE_WEIGHT for row in rated])
        flags = flag_values([row.description for row in rated])
        terms = [model.difference.weight, model.pair_terms.weight]
        chosen = {id(parameter) for parameter in terms}
        others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        groups = [
            {"params": others, "weight_decay": settings.decay},
            {"params": terms, "weight_decay": 5 * settings.decay},
        ]
        optimizer = torch.optim.AdamW(groups, lr=settings.rate)
        steps = settings.epochs * math.ceil(len(rated) / settings.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(1.0, step / 50) * (0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01),
        )
        for _ in range(settings.epochs):
            for rows in torch.randperm(len(rated)).split(settings.batch):
                text = vocabulary.flatten([captions[i] for i in rows])
                expected, odds = model(text, flags[rows] * _known(len(rows)), settings)
                loss = (weights[rows] * (expected - means[rows]) ** 2).mean()
                loss = loss + settings.flag_loss * functional.binary_cross_entropy_with_logits(
                    odds, (flags[rows] + 1) / 2
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            on_epoch()
    return to_integers(model.eval())


def flag_values(descriptions: Sequence[Description]) -> Tensor:
    """Return has_text and has_faces as -1, 0 (unknown) or 1, (N, 2)."""
    sign = {None: 0.0, True: 1.0, False: -1.0}
    return torch.tensor([[sign[d.has_text], sign[d.has_faces]] for d in descriptions]).reshape(-1, 2)


def _known(count: int) -> Tensor:
    """Draw which flags of captions are given: all of half, none of a fifth, each of most others."""
    state = torch.rand(count, 1)
    single = (torch.rand(count, 2) > 0.25).float()
    return torch.where(state < 0.2, 0.0, torch.where(state < 0.7, 1.0, single))


@torch.no_grad()
def to_integers(model: FastModel) -> Network:
    """Round the weights of a model to integers times powers of two."""
    table, terms = model.word_table()
    vectors, vector_unit = _integers(table, np.int8)
    importance = model.importances(table) * (torch.arange(len(table)) != SEPARATOR)[:, None]
    importance = (importance / importance.max() * 2**12).clamp_min(1).round()
    importance[SEPARATOR] = 0
    terms = torch.cat([terms, model.pair_terms.weight])
    terms[[SEPARATOR, len(table)]] = 0
    linear, linear_unit = _integers(terms[:, 0], np.int16)
    kernel, kernel_unit = _integers(model.convolution.weight.T, np.int8)
    bias = model.convolution.bias.double() / 2.0 ** (vector_unit + kernel_unit)
    layers = [_with_bias(model.hidden_1), _with_bias(model.hidden_2), _with_bias(model.output, _MIDDLE)]
    (hidden_1, unit_1), (hidden_2, unit_2), (output, unit_3) = (
        _integers(layer, np.int16) for layer in layers
    )
    units = [vector_unit, linear_unit, kernel_unit, unit_1, unit_2, unit_3]
    return Network(
        vectors=vectors,
        importance=importance[:, 0].numpy().astype(np.int16),
        properties=model.properties.numpy().astype(bool),
        word_terms=linear[: len(table)],
        pair_terms=linear[len(table) :],
        kernel=kernel,
        kernel_bias=bias.round().numpy().astype(np.int32),
        hidden_1=hidden_1,
        hidden_2=hidden_2,
        output=output[:, 0],
        units=np.array(units, np.int16),
    )


def _with_bias(layer: nn.Linear, extra: float = 0.0) -> Tensor:
    """Return weights and, as the last row, the bias, (inputs + 1, outputs)."""
    return torch.cat([layer.weight, layer.bias[:, None] + extra], 1).T


def _integers(values: Tensor, dtype: type[np.signedinteger]) -> tuple[np.ndarray, int]:
    """Return integers and the smallest exponent e with which values ≈ integers · 2^e fit the type."""
    limit = np.iinfo(dtype).max
    exponent = math.ceil(math.log2(max(float(values.abs().max()), 1e-9) / limit))
    return (values.double() / 2.0**exponent).round().numpy().astype(dtype), exponent
