"""Methods of an evaluation: each reconstructs an image at its full size from a number of bits.

| name | reconstruction |
|---|---|
| `guide G` | the guide of G x G tokens, enlarged |
| `downscaled G` | the image resized to the guide's size and enlarged, without codes: the limit of a guide |
| `jpeg G`, `webp G` | a file of at most as many bits as the guide's codes |
| `super-resolution G` | the guide, enlarged by a network |
| `movq G` | MoVQ of G x G tokens, enlarged |
| `re-rendered G` | the method of the paper |
| `unconditioned G` | likewise without the semantic codes |
| `true text G` | likewise with the text states of the image's caption, which the semantic codes approximate |
| `semantic` | likewise without the guide |
| `mean colour` | one colour per image |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cat_fast.dual_token.grid import Grid
from cat_fast.dual_token.rerender.rerender import RerenderSettings, rerender
from cat_fast.dual_token.resize import resize
from cat_fast.dual_token.tokenizer import DualTokenizer
from cat_fast.dual_token.tokens import DualTokens
from cat_fast.evaluation.dual_token.bit_budget import FORMATS, at_bits
from cat_fast.evaluation.dual_token.movq import MoVQ
from cat_fast.evaluation.dual_token.super_resolution import Upscale

MEAN_COLOUR, SEMANTIC = "mean colour", "semantic"


class Sample(NamedTuple):
    """An image to reconstruct."""

    image: Tensor
    """(3, H, W) in [-1, 1]."""
    seed: int = 0
    """Seed of the noise, for methods that draw some."""
    caption: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[1], self.image.shape[2]


@dataclass(frozen=True)
class Method:
    """A way to reconstruct images."""

    name: str
    tokens: int | None
    """Tokens per image; None for methods without tokens."""
    bits: float | None
    """Bits per image; None for methods without a code."""
    reconstruct: Callable[[Sample], Tensor | None]
    """Returns the reconstruction (3, H, W), None if there is none."""
    uses_caption: bool = False


def make_methods(
    tokenizer: DualTokenizer,
    grids: Sequence[Grid],
    settings: RerenderSettings | None = None,
    upscale: Upscale | None = None,
    movq: MoVQ | None = None,
    true_text: bool = False,
) -> list[Method]:
    """Return the methods to compare.

    Args:
        grids: guide sizes.
        settings: of re-rendering; None leaves it out.
        upscale: super-resolution network; None leaves it out.
        movq: MoVQ of the same numbers of tokens; None leaves it out.
        true_text: also re-render with the text states of the captions, the limit of the semantic codes.
    """
    methods = [Method(MEAN_COLOUR, None, None, _mean_colour)]
    for grid in grids:
        name, count = format_name(grid), grid[0] * grid[1]
        bits = count * tokenizer.vocabulary.guide_bits
        size = tokenizer.guide.guide_size(grid)
        methods.append(Method(f"guide {name}", count, bits, partial(_guide, tokenizer, grid)))
        methods.append(Method(f"downscaled {name}", None, None, partial(_downscaled, size)))
        methods += [Method(f"{kind} {name}", None, bits, partial(_file, bits, kind)) for kind in FORMATS]
        if upscale is not None:
            enlarge = partial(_super_resolution, tokenizer, grid, upscale)
            methods.append(Method(f"super-resolution {name}", count, bits, enlarge))
        if movq is not None:
            methods.append(Method(f"movq {name}", count, count * movq.bits, partial(_movq, movq, grid)))
    if settings is None:
        return methods
    length = tokenizer.vocabulary.semantic_length
    semantic_bits = length * tokenizer.vocabulary.semantic_bits
    for grid in grids:
        name, count = format_name(grid), grid[0] * grid[1]
        bits = count * tokenizer.vocabulary.guide_bits
        plain = replace(settings, mode="unconditioned")
        draw = partial(_rerendered, tokenizer, grid, plain)
        methods.append(Method(f"unconditioned {name}", count, bits, draw))
        if length:
            draw = partial(_rerendered, tokenizer, grid, settings)
            methods.append(Method(f"re-rendered {name}", count + length, bits + semantic_bits, draw))
        if true_text:
            draw = partial(_with_true_text, tokenizer, grid, settings)
            methods.append(Method(f"true text {name}", None, None, draw, uses_caption=True))
    if length:
        alone = partial(_rerendered, tokenizer, grids[0], replace(settings, mode="semantic"))
        methods.append(Method(SEMANTIC, length, semantic_bits, alone))
    return methods


def format_name(grid: Grid) -> str:
    """Return the name of a grid in methods: its side, or `20x17`."""
    return str(grid[0]) if grid[0] == grid[1] else f"{grid[0]}x{grid[1]}"


def _mean_colour(sample: Sample) -> Tensor:
    return sample.image.mean((1, 2), keepdim=True).expand_as(sample.image)


def _guide(tokenizer: DualTokenizer, grid: Grid, sample: Sample) -> Tensor:
    return _enlarged(_guide_of(tokenizer, grid, sample), sample)


def _downscaled(size: tuple[int, int], sample: Sample) -> Tensor:
    return _enlarged(resize(sample.image[None], size)[0], sample)


def _file(bits: float, image_format: str, sample: Sample) -> Tensor | None:
    return at_bits(sample.image, bits, image_format)


def _super_resolution(tokenizer: DualTokenizer, grid: Grid, upscale: Upscale, sample: Sample) -> Tensor:
    return upscale(_guide_of(tokenizer, grid, sample)[None], sample.size)[0].to(sample.image)


def _movq(movq: MoVQ, grid: Grid, sample: Sample) -> Tensor:
    return _enlarged(movq.reconstruct(sample.image, grid).to(sample.image), sample)


def _rerendered(tokenizer: DualTokenizer, grid: Grid, settings: RerenderSettings, sample: Sample) -> Tensor:
    tokens = tokenizer.encode(sample.image, grid)
    if settings.mode == "semantic":
        tokens = DualTokens(tokens.semantic, torch.empty(0, 0, dtype=torch.int64))
    return tokenizer.decode_batch([tokens], sample.size, settings, [sample.seed])[0].to(sample.image)


def _with_true_text(
    tokenizer: DualTokenizer, grid: Grid, settings: RerenderSettings, sample: Sample
) -> Tensor:
    backend = tokenizer.backend
    guide = _guide_of(tokenizer, grid, sample)[None]
    states = backend.text_target.states([sample.caption])
    return rerender(backend, guide, states, sample.size, settings, [sample.seed])[0].to(sample.image)


def _guide_of(tokenizer: DualTokenizer, grid: Grid, sample: Sample) -> Tensor:
    return tokenizer.decode_guides([tokenizer.encode(sample.image, grid)])[0].to(sample.image)


def _enlarged(small: Tensor, sample: Sample) -> Tensor:
    return resize(small[None], sample.size)[0]
