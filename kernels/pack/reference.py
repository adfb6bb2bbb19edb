"""Latents <-> packed tokens in plain torch: DiT's patchify and its exact inverse, and the last fallback.

A token is one ``p x p`` patch of a latent. Tokens run row by row over the patch grid. Within a token the
features are ordered (row in patch, column in patch, channel), channel fastest. DiT's final layer writes this
order (its unpatchify reads "n h w p q c"), so the model's input and output share it.
"""

from collections.abc import Sequence

import torch


def pack_reference(latents: Sequence[torch.Tensor], patch_size: int) -> torch.Tensor:
    """Convert (c, h*p, w*p) latents to tokens (T, p*p*c), one latent after another."""
    return torch.cat([patchify(latent, patch_size) for latent in latents])


def unpack_reference(
    tokens: torch.Tensor, grids: Sequence[tuple[int, int]], patch_size: int
) -> list[torch.Tensor]:
    """Convert (T, p*p*c) tokens to a (c, h*p, w*p) latent for each (h, w) grid; inverts `pack_reference`."""
    parts = tokens.split([h * w for h, w in grids])
    return [unpatchify(part, grid, patch_size) for part, grid in zip(parts, grids, strict=True)]


def patchify(latent: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Convert a (c, h*p, w*p) latent to (h*w, p*p*c) tokens."""
    channels, height, width = latent.shape
    h, w, p = height // patch_size, width // patch_size, patch_size
    patches = latent.reshape(channels, h, p, w, p)
    return patches.permute(1, 3, 2, 4, 0).reshape(h * w, p * p * channels)


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """Convert (h*w, p*p*c) tokens of a (h, w) grid to a (c, h*p, w*p) latent."""
    (h, w), p = grid, patch_size
    channels = tokens.shape[1] // p**2
    patches = tokens.reshape(h, w, p, p, channels)
    return patches.permute(4, 0, 2, 1, 3).reshape(channels, h * p, w * p)
