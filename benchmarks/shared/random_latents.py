"""A small dataset of random latents, for runs whose models need not learn."""

from pathlib import Path

import torch

from cat_fast.data.latents.dataset import LatentShardWriter


def write_latents(folder: Path) -> Path:
    """Write latents of 24 images of 128 px, 64, 16 and 4 tokens long; return the folder."""
    generator = torch.Generator().manual_seed(0)
    with LatentShardWriter(folder, "0" * 16, resolution=128, class_names=["a", "b"]) as writer:
        for number in range(24):
            ratio = (8, 16, 32)[number % 3]
            latent = torch.randn(4, 128 // ratio, 128 // ratio, generator=generator)
            writer.add(f"image{number}", latent, label=number % 2, ratio=ratio)
    return folder
