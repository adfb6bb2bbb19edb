"""The network of the fast scorer in exact arithmetic.

Per word: a vector from a table, and a convolution over three neighbouring words. Per caption: sums and maxima
of these, a mean weighted by a learned importance of each word, counts, and the flags; two hidden layers; plus
a linear term per word and per pair of words.

Weights are integers times a power of two, and inputs of products are rounded to such multiples. So all
products and sums are exact, in any order: a score depends neither on the other captions of its batch, nor on
the BLAS library, the number of threads or the processor. The remaining operations (a division, a square root)
are rounded as IEEE 754 demands.
"""

from dataclasses import dataclass, fields

import numpy as np

from cat_fast.complexity.scorers.fast.words import SEPARATOR, FlatWords

WINDOW = 3
FLAGS = 5
"""Inputs from the flags: two values (-1, 0 if unknown, 1), which of them are known, and their product."""
_GRID = 2.0**10
"""Inputs of the dense layers are multiples of 1 / _GRID."""
_LARGEST = 2.0**10
"""Inputs of the dense layers are clipped to this magnitude, which only captions of 100,000 words reach."""


@dataclass(frozen=True)
class Network:
    """Weights as integers; `units` holds the power of two of each array.

    V is the size of the vocabulary, D the size of a word vector, C the number of convolution outputs, H the
    size of a hidden layer, P the number of counted properties, and K = 2 D + 2 C + P + 2 + FLAGS.
    """

    vectors: np.ndarray
    """int8 (V, D); rows of separators are 0."""
    importance: np.ndarray
    """Positive weight of a word in the weighted mean, int16 (V,); 0 for separators."""
    properties: np.ndarray
    """Properties of words to count, bool (V, P)."""
    word_terms: np.ndarray
    """Linear term per word, int16 (V,)."""
    pair_terms: np.ndarray
    """Linear term per pair of words, int16 (pairs + 1,); the first is 0."""
    kernel: np.ndarray
    """Convolution over WINDOW words, int8 (WINDOW * D, C)."""
    kernel_bias: np.ndarray
    """int32 (C,), in the unit of `vectors` times that of `kernel`."""
    hidden_1: np.ndarray
    """int16 (K + 1, H); the last row is the bias."""
    hidden_2: np.ndarray
    """int16 (H + 1, H)."""
    output: np.ndarray
    """int16 (K + H + 1,): weights of the inputs, of the second hidden layer, and the bias."""
    units: np.ndarray
    """Exponents of the units of vectors, word_terms, kernel, hidden_1, hidden_2 and output, int16 (6,)."""

    def __post_init__(self) -> None:
        v, d = self.vectors.shape
        c, h, p = self.kernel.shape[1], self.hidden_2.shape[1], self.properties.shape[1]
        k = 2 * d + 2 * c + p + 2 + FLAGS
        expected = {
            "importance": (v,),
            "properties": (v, p),
            "word_terms": (v,),
            "kernel": (WINDOW * d, c),
            "kernel_bias": (c,),
            "hidden_1": (k + 1, h),
            "hidden_2": (h + 1, h),
            "output": (k + h + 1,),
            "units": (6,),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {getattr(self, name).shape}")

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the arrays."""
        return [field.name for field in fields(cls)]

    def predict(self, text: FlatWords, flags: np.ndarray) -> np.ndarray:
        """Return the expected score before calibration, float64 (N,).

        Args:
            text: words of N captions.
            flags: has_text and has_faces as -1, 0 (unknown) or 1, float64 (N, 2).
        """
        if not len(text.starts):
            return np.zeros(0)
        lengths = np.maximum(text.lengths, 1).astype(np.float64)[:, None]
        root = np.sqrt(lengths)
        known = np.abs(flags)
        inputs = [*self._pooled(text, lengths, root), flags, known, flags[:, :1] * flags[:, 1:]]
        x = _to_grid(np.concatenate(inputs, axis=1))
        unit = 2.0 ** self.units[3:].astype(np.float64)
        hidden = _dense(_dense(x, self.hidden_1, unit[0]), self.hidden_2, unit[1])
        outputs = _affine(np.concatenate([x, hidden], axis=1), self.output[:, None], unit[2])[:, 0]
        terms = self.word_terms[text.words].astype(np.int64) + self.pair_terms[text.pairs]
        linear = _segment_sums(terms[:, None], text)[:, 0] * 2.0 ** float(self.units[1])
        return outputs + linear / root[:, 0]

    def _pooled(self, text: FlatWords, lengths: np.ndarray, root: np.ndarray) -> list[np.ndarray]:
        vectors = self.vectors[text.words].astype(np.float32)
        unit = 2.0 ** float(self.units[0])
        convolved = self._convolve(vectors) * (text.words != SEPARATOR)[:, None]
        importance = self.importance[text.words].astype(np.float64)[:, None]
        weights = np.maximum(_segment_sums(importance, text), 1)
        return [
            _segment_sums(vectors, text) * (unit / 2) / root,
            np.maximum.reduceat(convolved, text.starts, axis=0),
            _segment_sums(convolved, text) / (2 * root),
            _segment_sums(vectors * importance, text) * unit / weights,
            _segment_sums(self.properties[text.words], text) / 2,
            4 * lengths / (lengths + 12) - 2,
            root / 4 - 1,
        ]

    def _convolve(self, vectors: np.ndarray) -> np.ndarray:
        """Return the rectified convolution, float32 (T, C)."""
        left, middle, right = np.split(self.kernel.astype(np.float32), WINDOW)
        total = vectors @ middle  # integers below 2^24, exact in float32
        total[1:] += vectors[:-1] @ left
        total[:-1] += vectors[1:] @ right
        total += self.kernel_bias.astype(np.float32)
        np.maximum(total, 0, out=total)
        total *= np.float32(2.0 ** float(self.units[0] + self.units[2]))
        return total


def _dense(x: np.ndarray, weights: np.ndarray, unit: float) -> np.ndarray:
    """Return a layer with the activation x · (1 + x / sqrt(1 + x²)) / 2, on the grid."""
    y = _affine(x, weights, unit)
    return _to_grid(y * (0.5 + 0.5 * y / np.sqrt(1 + y * y)))


def _affine(x: np.ndarray, weights: np.ndarray, unit: float) -> np.ndarray:
    return (x @ weights[:-1].astype(np.float64) + weights[-1]) * unit


def _to_grid(x: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x * _GRID) / _GRID, -_LARGEST, _LARGEST)


def _segment_sums(values: np.ndarray, text: FlatWords) -> np.ndarray:
    """Return the sum of `values` (T, F) per caption, float64 (N, F); exact for multiples of one unit."""
    return np.add.reduceat(values, text.starts, axis=0, dtype=np.float64)
