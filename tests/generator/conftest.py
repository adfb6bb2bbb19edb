"""Small DiTs with non-zero blocks, and random batches of mixed ratios and texts."""

import pytest
import torch

from cat_fast.generator import DiT, PackedText
from cat_fast.packing import PackedSequence

GRID_OF_RATIO = {8: (8, 8), 16: (4, 4), 32: (2, 2)}
TEXT_DIM = 12


@pytest.fixture
def make_dit():
    """Build DiTs with random weights in zero-initialised layers: a fresh DiT predicts zero for any input."""

    def make(**options) -> DiT:
        torch.manual_seed(0)
        sizes = {"in_channels": 4, "hidden_size": 48, "depth": 2, "num_heads": 2, "num_classes": 10}
        model = DiT(**(sizes | {"position_frame": 8} | options))
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.05)
        return model.eval()

    return make


@pytest.fixture
def tiny_dit(make_dit) -> DiT:
    return make_dit()


@pytest.fixture
def random_mix():
    def make(seed: int, count: int = 6, stretch: int = 0) -> PackedSequence:
        """Return a batch of `count` images, each up to `stretch` tokens wider than high."""
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randint(3, (count,), generator=generator).tolist()
        wider = torch.randint(stretch + 1, (count,), generator=generator).tolist()
        ratios = [(8, 16, 32)[i] for i in draws]
        latents = [
            torch.randn(4, 2 * GRID_OF_RATIO[r][0], 2 * (GRID_OF_RATIO[r][1] + more), generator=generator)
            for r, more in zip(ratios, wider, strict=True)
        ]
        labels = torch.randint(10, (count,), generator=generator)
        timesteps = torch.randint(1000, (count,), generator=generator)
        packed = PackedSequence.from_latents(latents, ratios, labels=labels)
        return packed.replace(timestep=timesteps)

    return make


@pytest.fixture
def random_texts():
    def make(seed: int, count: int = 6) -> PackedText:
        """Return texts of 0 to 9 tokens; the first is empty."""
        generator = torch.Generator().manual_seed(seed)
        lengths = [0, *torch.randint(10, (count - 1,), generator=generator).tolist()]
        return PackedText.of([torch.randn(length, TEXT_DIM, generator=generator) for length in lengths])

    return make
