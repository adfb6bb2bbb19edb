"""Counter-based noise: every draw is a function of its request's seed and of a counter."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

_UINT64 = 2**64


@dataclass(frozen=True)
class CounterNoise:
    """Standard normal noise of one image.

    Draw `counter` is a function of the seed and the counter: it depends neither on earlier draws, nor on
    other images, nor on the device. Bits come from Philox-4x64 (Salmon et al., SC 2011), normal values from
    them by the Box-Muller transform in float64.
    """

    key: tuple[int, int]
    """The seed, and a second number that differs if one `torch.Generator` is used repeatedly."""

    @classmethod
    def from_seed(cls, seed: int) -> Self:
        """Return the noise of a seed: that of a new `torch.Generator` with this seed."""
        return cls.from_generator(torch.Generator().manual_seed(seed))

    @classmethod
    def from_generator(cls, generator: torch.Generator) -> Self:
        """Return the noise that a generator's seed and state determine; advances the generator."""
        draw = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
        return cls((generator.initial_seed() % _UINT64, int(draw)))

    def normal(self, counter: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Return draw `counter`, float32 of `shape`, on the CPU."""
        count = int(np.prod(shape))
        bits = self._philox(counter).random_raw(2 * ((count + 1) // 2))
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
        first, second = uniform.reshape(2, -1)
        radius, angle = np.sqrt(-2.0 * np.log(first)), 2.0 * np.pi * second
        values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
        return torch.from_numpy(values.astype(np.float32)).reshape(shape)

    def generator(self, counter: int) -> torch.Generator:
        """Return a generator seeded by draw `counter`, for solvers that take nothing else."""
        (seed,) = self._philox(counter).random_raw(1)
        return torch.Generator().manual_seed(int(seed))

    def _philox(self, counter: int) -> np.random.Philox:
        # the last word of Philox's counter numbers the draws, the first one runs within a draw
        return np.random.Philox(counter=counter << 192, key=np.array(self.key, dtype=np.uint64))
