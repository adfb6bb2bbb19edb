"""Evaluation of the language model on held-out pairs: bits per id against counts and other captions."""

import math
import time
from collections.abc import Sequence

import numpy as np
import torch

from cat_fast.dual_token.language.counts import Counts
from cat_fast.dual_token.language.model import DualLanguageModel
from cat_fast.dual_token.semantic.text_target import TextTarget
from cat_fast.evaluation.intervals import ratio_interval
from cat_fast.training.dual_token.encoded_pairs import EncodedPair
from cat_fast.training.metrics.held_out_evaluation import SECONDS

_BATCH = 8


class LanguageEvaluation:
    """Held-out pairs.

    Args:
        training: sequences that counts are made of.
        held_out: evaluated pairs; a pair's other caption is that of the next pair with a different one.
        vocab_size: number of ids.
    """

    def __init__(
        self,
        training: Sequence[EncodedPair],
        held_out: Sequence[EncodedPair],
        target: TextTarget,
        vocab_size: int,
    ) -> None:
        self.pairs = list(held_out)
        sequences = [pair.ids for pair in self.pairs]
        self.lengths = np.array([len(ids) - 1 for ids in sequences])
        counts = Counts((pair.ids for pair in training), vocab_size)
        self.counts = {
            kind: np.array([bits.sum() for bits in counts.best_bits(sequences, kind)])
            for kind in ("unigram", "bigram")
        }
        self.own = target.states([pair.caption for pair in self.pairs])
        self.other = target.states(_other_captions([pair.caption for pair in self.pairs]))

    @torch.no_grad()
    def evaluate(self, model: DualLanguageModel) -> dict[str, float]:
        """Return bits per id by name, the upper ends of the intervals of three differences, and the seconds.

        A difference is the model's bits with the right captions minus those of counts or of other captions;
        it is below zero outside its 95 % interval if the upper end is negative.
        """
        started = time.perf_counter()
        own, other = self._bits(model, self.own), self._bits(model, self.other)
        found = {"bits": own, "bits_with_other_captions": other}
        found |= {f"bits_of_{kind}s": bits for kind, bits in self.counts.items()}
        figures = {f"held_out/{name}": bits.sum() / self.lengths.sum() for name, bits in found.items()}
        for name, bits in found.items():
            if name != "bits" and (estimate := ratio_interval(own - bits, self.lengths)) is not None:
                figures[f"held_out/{name}_difference_upper"] = estimate.high
        return {name: float(value) for name, value in figures.items()} | {
            SECONDS: round(time.perf_counter() - started, 4)
        }

    def _bits(self, model: DualLanguageModel, texts: Sequence[torch.Tensor]) -> np.ndarray:
        """Return the bits of each sequence, (N,)."""
        found: list[float] = []
        for start in range(0, len(self.pairs), _BATCH):
            pairs = self.pairs[start : start + _BATCH]
            output = model([pair.ids for pair in pairs], list(texts[start : start + _BATCH]))
            sums = torch.zeros(len(pairs), dtype=torch.float64, device=output.losses.device)
            sums.index_add_(0, output.owners, output.losses.double())
            found += (sums / math.log(2)).tolist()
        return np.array(found)


def _other_captions(captions: Sequence[str]) -> list[str]:
    """Return for each caption the next different one, in a circle; itself if all are equal."""
    count = len(captions)
    found = []
    for i, caption in enumerate(captions):
        following = (captions[(i + step) % count] for step in range(1, count))
        found.append(next((one for one in following if one != caption), caption))
    return found
