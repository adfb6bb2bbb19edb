"""A small DiT whose blocks do something, and random mixes of ratios."""

import pytest
import torch

from cat_fast.generator import DiT
from cat_fast.packing import PackedSequence

GRID_OF_RATIO = {8: (8, 8), 16: (4, 4), 32: (2, 2)}


@pytest.fixture
def tiny_dit() -> DiT:
    """Zero-initialised layers get random weights: a fresh DiT predicts zero and would pass any comparison."""
    torch.manual_seed(0)
    model = DiT(in_channels=4, hidden_size=48, depth=2, num_heads=2, num_classes=10, position_frame=8)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model.eval()


@pytest.fixture
def random_mix():
    def make(seed: int, count: int = 6) -> PackedSequence:
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randint(3, (count,), generator=generator).tolist()
        ratios = [(8, 16, 32)[i] for i in draws]
        latents = [
            torch.randn(4, 2 * GRID_OF_RATIO[r][0], 2 * GRID_OF_RATIO[r][1], generator=generator)
            for r in ratios
        ]
        labels = torch.randint(10, (count,), generator=generator)
        timesteps = torch.randint(1000, (count,), generator=generator)
        packed = PackedSequence.from_latents(latents, ratios, labels=labels)
        return packed.replace(timestep=timesteps)

    return make
