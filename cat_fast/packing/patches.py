"""Latent <-> tokens: the exactly invertible patchify of DiT.

A token is one ``p x p`` patch of a latent. Tokens run row by row over the patch grid; inside a token the
features run (row in patch, column in patch, channel), channel fastest. This is the order that DiT's final
layer writes (its unpatchify reads "n h w p q c"), so one order serves the model's input and its output.
"""

import torch


def patchify(latent: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(c, h*p, w*p) latent -> (h*w, p*p*c) tokens."""
    channels, height, width = latent.shape
    p = patch_size
    patches = latent.reshape(channels, height // p, p, width // p, p)
    return patches.permute(1, 3, 2, 4, 0).reshape(-1, p * p * channels)


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """(h*w, p*p*c) tokens of a (h, w) grid -> (c, h*p, w*p) latent."""
    (h, w), p = grid, patch_size
    patches = tokens.reshape(h, w, p, p, -1)
    return patches.permute(4, 0, 2, 1, 3).reshape(-1, h * p, w * p)
