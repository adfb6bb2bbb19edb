"""`TextCache`: encoded texts kept in host memory, so that each distinct text is encoded once."""

from collections import OrderedDict
from collections.abc import Sequence

import torch

from cat_fast.generator.packed_text import PackedText
from cat_fast.generator.text_encoder import TextEncoder


class TextCache:
    """LRU cache in front of a `TextEncoder`, called like one.

    Each text is encoded alone, not in a batch, because padding and neighbours change the last bits of its
    states. The states are thus a function of the text only, so a resumed run computes the same states as an
    uninterrupted one.

    Args:
        max_bytes: memory for states; beyond it, the least recently used ones are dropped.
    """

    def __init__(self, encoder: TextEncoder, max_bytes: int) -> None:
        self.encoder, self.max_bytes = encoder, max_bytes
        self.bytes = 0
        """Size of the cached states."""
        self._states: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> PackedText:
        """Encode texts, like `TextEncoder.__call__`."""
        packed = PackedText.of([self._get(text) for text in texts])
        return packed.to(self.encoder.model.device)

    def _get(self, text: str) -> torch.Tensor:
        """Return the states of a text, (tokens, dim), on the CPU."""
        states = self._states.pop(text, None)
        if states is None:
            states = self.encoder([text]).tokens.cpu()
            self.bytes += states.nbytes
        self._states[text] = states
        while self.bytes > self.max_bytes:
            _, dropped = self._states.popitem(last=False)
            self.bytes -= dropped.nbytes
        return states


def estimate_bytes(encoder: TextEncoder, count: int, sample: Sequence[str]) -> float:
    """Estimate the size of the states of `count` texts from the lengths of a sample."""
    mean_tokens = sum(encoder.count_tokens(sample)) / len(sample)
    return count * mean_tokens * encoder.dim * encoder.model.dtype.itemsize
