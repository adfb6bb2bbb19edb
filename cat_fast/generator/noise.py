"""Counter-based noise: every draw is a function of its request's seed and of a counter, on any device.

Bits come from Philox-4x64 (Salmon et al., SC 2011), normal values from them by the Box-Muller transform in
float64. On a GPU, Philox runs in int64 arithmetic, on all images of a step at once. Logarithm, sine and
cosine are computed from additions, products, quotients and square roots, one operator each, which IEEE 754
rounds alike everywhere; those of libraries differ in their last bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch

from cat_fast.packing.transfer import copy_together

_UINT64 = 2**64
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_ROUNDS = 10
_LOW = 2**32 - 1


@dataclass(frozen=True)
class CounterNoise:
    """Standard normal noise of one image.

    Draw `counter` is a function of the seed and the counter: it depends neither on earlier draws, nor on
    other images, nor on the device.
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
        return draw_together([Draw(self, counter, shape)], torch.device("cpu"))[0]

    def generator(self, counter: int) -> torch.Generator:
        """Return a generator seeded by draw `counter`, for solvers that take nothing else."""
        (seed,) = self.philox(counter).random_raw(1)
        return torch.Generator().manual_seed(int(seed))

    def philox(self, counter: int) -> np.random.Philox:
        """Return the source of the bits of draw `counter`."""
        # the last word of Philox's counter numbers the draws, the first one runs within a draw
        return np.random.Philox(counter=counter << 192, key=np.array(self.key, dtype=np.uint64))


class Draw(NamedTuple):
    """A draw of one image's noise."""

    noise: CounterNoise
    counter: int
    shape: tuple[int, ...]

    @property
    def pairs(self) -> int:
        """Number of pairs of normal values; of an odd number, the last one is left out."""
        return (math.prod(self.shape) + 1) // 2


def draw_together(draws: Sequence[Draw], device: torch.device) -> list[torch.Tensor]:
    """Return the values of each draw, float32, on a device; the host does not wait for it."""
    words = _words_on_host(draws) if device.type == "cpu" else _words(draws, device)
    first = torch.cat([one[: draw.pairs] for one, draw in zip(words, draws, strict=True)])
    second = torch.cat([one[draw.pairs : 2 * draw.pairs] for one, draw in zip(words, draws, strict=True)])
    cosines, sines = box_muller(first, second)
    sizes = [draw.pairs for draw in draws]
    return [
        torch.cat([cosine, sine])[: math.prod(draw.shape)].reshape(draw.shape)
        for cosine, sine, draw in zip(cosines.split(sizes), sines.split(sizes), draws, strict=True)
    ]


def _words_on_host(draws: Sequence[Draw]) -> list[torch.Tensor]:
    """Return the random 64-bit words of each draw, as int64."""
    return [
        torch.from_numpy(draw.noise.philox(draw.counter).random_raw(2 * draw.pairs).view(np.int64))
        for draw in draws
    ]


def _words(draws: Sequence[Draw], device: torch.device) -> list[torch.Tensor]:
    """Return the same by `philox` on a device, followed by up to three unused words."""
    blocks = [-(-draw.pairs // 2) for draw in draws]
    table = [[_signed(word) for word in (*draw.noise.key, draw.counter)] for draw in draws]
    first_block = [1 - sum(blocks[:i]) for i in range(len(blocks))]
    keys, start, count = copy_together(
        [torch.tensor(table), torch.tensor(first_block), torch.tensor(blocks)], device
    )
    image = torch.arange(len(draws), device=device).repeat_interleave(count, output_size=sum(blocks))
    block = torch.arange(sum(blocks), device=device) + start[image]
    words = philox(block, *keys[image].unbind(1))
    return [one.flatten() for one in words.split(blocks)]


def philox(block: torch.Tensor, key0: torch.Tensor, key1: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """Return four random words per block, (n, 4), of Philox-4x64 with counters (block, 0, 0, draw).

    Unsigned words are held in int64, (n,) each, whose sums and products wrap around alike.
    """
    multipliers, lower, upper = (
        torch.stack([torch.full_like(block, word) for word in words])
        for words in (
            [_signed(word) for word in _MULTIPLIERS],
            [word & _LOW for word in _MULTIPLIERS],
            [word >> 32 for word in _MULTIPLIERS],
        )
    )
    keys = torch.stack([key0, key1])
    weyl = torch.stack([torch.full_like(block, _signed(word)) for word in _WEYL])
    factors = torch.stack([block, torch.zeros_like(block)])  # words 0 and 2 of the counter
    others = torch.stack([torch.zeros_like(block), draw])  # words 1 and 3
    for _ in range(_ROUNDS):
        high, low = _high_product(factors, lower, upper), factors * multipliers
        factors, others = high.flip(0) ^ others ^ keys, low.flip(0)
        keys = keys + weyl
    return torch.stack([factors[0], others[0], factors[1], others[1]], dim=1)


def _high_product(a: torch.Tensor, b0: torch.Tensor, b1: torch.Tensor) -> torch.Tensor:
    """Return the upper 64 bits of the products of unsigned words and b0 + 2^32 b1."""
    a0, a1 = a & _LOW, _upper(a)
    cross, other = a1 * b0, a0 * b1
    carry = (_upper(a0 * b0) + (cross & _LOW) + (other & _LOW)) >> 32
    return a1 * b1 + _upper(cross) + _upper(other) + carry


def _upper(word: torch.Tensor) -> torch.Tensor:
    """Return the upper 32 bits of unsigned words."""
    return (word >> 32) & _LOW


def _signed(word: int) -> int:
    """Return the int64 with the bits of an unsigned word."""
    return word - _UINT64 if word >= _UINT64 // 2 else word


def box_muller(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two independent standard normal values, float32, for each pair of random words."""
    radius = (_log(_uniform(first)) * -2.0).sqrt()
    cosine, sine = _cos_sin(_uniform(second) * (2.0 * math.pi))
    return (radius * cosine).float(), (radius * sine).float()


def _uniform(word: torch.Tensor) -> torch.Tensor:
    """Return float64 numbers in (0, 1) from the upper 53 bits of words."""
    return (((word >> 11) & (2**53 - 1)).double() + 0.5) * 2.0**-53


_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LOG = (
    6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01, 2.222219843214978396e-01,
    1.818357216161805012e-01, 1.531383769920937332e-01, 1.479819860511658591e-01,
)  # fmt: skip
_HALF_PI_HIGH, _HALF_PI_LOW = 1.57079632673412561417, 6.07710050650619224932e-11
_SINE = (
    -1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04,
    2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10,
)  # fmt: skip
_COSINE = (
    4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05,
    -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11,
)  # fmt: skip
"""Polynomials and constants of fdlibm (Sun Microsystems, 1993), whose errors are below one unit in the last
place."""


def _log(x: torch.Tensor) -> torch.Tensor:
    """Return the natural logarithm of positive normal float64 numbers."""
    bits = x.view(torch.int64)
    mantissa = ((bits & (2**52 - 1)) | (1023 << 52)).view(torch.float64)  # in [1, 2)
    large = mantissa > math.sqrt(2.0)
    exponent = ((bits >> 52) - 1023 + large).double()
    f = torch.where(large, mantissa * 0.5, mantissa) - 1.0
    s = f / (f + 2.0)
    z = s * s
    half_square = f * f * 0.5
    series = s * (half_square + _polynomial(z, _LOG) * z)
    return exponent * _LN2_HIGH - ((half_square - (series + exponent * _LN2_LOW)) - f)


def _cos_sin(angle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of float64 angles in (0, 2 pi)."""
    quarter = (angle * (2.0 / math.pi)).round()
    rest, low = angle - quarter * _HALF_PI_HIGH, quarter * _HALF_PI_LOW
    x = rest - low
    tail = (rest - x) - low
    z = x * x
    cube = z * x
    sine = x - ((z * (tail * 0.5 - cube * _polynomial(z, _SINE[1:])) - tail) - cube * _SINE[0])
    half = z * 0.5
    near_one = 1.0 - half
    cosine = near_one + (((1.0 - near_one) - half) + (z * (_polynomial(z, _COSINE) * z) - x * tail))
    turn = quarter.long() & 3
    swap = (turn & 1).bool()
    cos = torch.where(swap, sine, cosine) * torch.where((turn == 1) | (turn == 2), -1.0, 1.0)
    sin = torch.where(swap, cosine, sine) * torch.where(turn >= 2, -1.0, 1.0)
    return cos, sin


def _polynomial(x: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    """Return sum of coefficients[i] * x^i, by Horner's rule."""
    value = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        value = value * x + coefficient
    return value
