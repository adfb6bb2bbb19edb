"""The batch of a run that needs the most memory, with random latents, for its rehearsal."""

from collections.abc import Sequence

import numpy as np
import torch

from cat_fast.data.latents.format import LatentEntry
from cat_fast.generator import PackedText
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.packing import PackedSequence


def choose_largest(lengths: np.ndarray, max_tokens: int) -> list[int]:
    """Return the indices of latents that fill a token budget with the longest sequences, with repeats.

    Args:
        lengths: number of tokens of each latent, (N,), at most `max_tokens`.
    """
    room, chosen = max_tokens, []
    for index in np.argsort(-lengths, kind="stable"):
        repeats, room = divmod(room, int(lengths[index]))
        chosen += [int(index)] * repeats
        if room < lengths.min():
            break
    return chosen


def make_batch(
    entries: Sequence[LatentEntry], patch_size: int, text_encoder: TextEncoder | None, device: torch.device
) -> tuple[PackedSequence, PackedText | None]:
    """Return random latents of these shapes, and the longest texts if the run has an encoder."""
    packed = PackedSequence.from_latents(
        [torch.randn(entry.shape) for entry in entries],
        [entry.ratio for entry in entries],
        patch_size,
        labels=[0] * len(entries),
    ).to(device)
    if text_encoder is None:
        return packed, None
    dtype = text_encoder.model.dtype
    states = torch.zeros(text_encoder.max_tokens, text_encoder.dim, dtype=dtype, device=device)
    return packed, PackedText.of([states] * len(entries))
