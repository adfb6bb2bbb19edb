"""Scale of latents: the affine map from the values of a tokenizer to those that a DiT is trained on."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch

from cat_fast.data.latents.moments import Moments, per_channel
from cat_fast.errors import UserError

Normalization = Literal["none", "per_channel", "per_ratio"]
NORMALIZATIONS: tuple[Normalization, ...] = ("none", "per_channel", "per_ratio")
Factor = float | Sequence[float] | Mapping[str, Sequence[float]]
"""One number, one per channel, or one per channel for each ratio: {"8": [...], "16": [...]}."""


def read_normalization(value: str | bool, setting: str = "normalized") -> Normalization:
    """Return the normalization that a value names; true is read as `per_channel`, false as `none`.

    Raises:
        UserError: unknown normalization; the message names `setting`.
    """
    name = {"true": "per_channel", "false": "none"}.get(str(value).lower(), value)
    for known in NORMALIZATIONS:
        if name == known:
            return known
    raise UserError(f"{setting}: expected one of {', '.join(NORMALIZATIONS)}, got {value!r}")


@dataclass(frozen=True)
class LatentScale:
    """Map from latents to the scale of a DiT: (latent - shift_factor) * scaling_factor."""

    shift_factor: Factor = 0.0
    scaling_factor: Factor = 1.0

    @classmethod
    def normalizing(cls, moments: Mapping[int, Moments], normalization: Normalization) -> Self:
        """Return the scale in which latents have mean 0 and standard deviation 1, every image weighing alike.

        Args:
            moments: those of the latents of each ratio.
            normalization: `per_channel` for one shift and scale per channel over all ratios, `per_ratio` for
                one per ratio and channel.
        """
        if normalization == "per_channel":
            total = Moments.merge(moments[ratio] for ratio in sorted(moments))
            return cls(list(total.mean), _inverse(total.std))
        return cls(
            {str(ratio): list(moments[ratio].mean) for ratio in sorted(moments)},
            {str(ratio): _inverse(moments[ratio].std) for ratio in sorted(moments)},
        )

    def to_json(self) -> dict[str, Any] | None:
        """Return the arguments of the scale as JSON values, None for the identity."""
        flat = {*_numbers(self.shift_factor)}, {*_numbers(self.scaling_factor)}
        return None if flat == ({0.0}, {1.0}) else asdict(self)

    def apply(self, latent: torch.Tensor, ratio: int) -> torch.Tensor:
        """Return latents (..., c, h, w) of one ratio in the scale of the DiT."""
        shift, scale = self._at(ratio)
        return (latent - shift.to(latent)) * scale.to(latent)

    def undo(self, latent: torch.Tensor, ratio: int) -> torch.Tensor:
        """Return latents (..., c, h, w) of one ratio, given in the scale of the DiT, as the tokenizer's."""
        shift, scale = self._at(ratio)
        return latent / scale.to(latent) + shift.to(latent)

    def check(self, ratios: Sequence[int], channels: int) -> None:
        """Check that there are finite values for all ratios and channels, and that scales are positive.

        Raises:
            UserError: there are not.
        """
        for name in ("shift_factor", "scaling_factor"):
            factor: Factor = getattr(self, name)
            if isinstance(factor, Mapping) and {*map(str, factor)} != {*map(str, ratios)}:
                raise UserError(
                    f"{name}: expected values for the ratios {', '.join(map(str, ratios))}, got those for "
                    f"{', '.join(map(str, factor))}"
                )
            for values in factor.values() if isinstance(factor, Mapping) else [factor]:
                numbers = _numbers(values)
                if isinstance(values, Sequence) and len(numbers) not in (1, channels):
                    raise UserError(
                        f"{name}: expected {channels} values, one per channel, got {len(numbers)}"
                    )
                least = 0 if name == "scaling_factor" else -math.inf
                if not all(math.isfinite(number) and number > least for number in numbers):
                    kind = "positive" if name == "scaling_factor" else "finite"
                    raise UserError(f"{name}: expected {kind} values, got {values}")

    def _at(self, ratio: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _at(self.shift_factor, ratio), _at(self.scaling_factor, ratio)


def _at(factor: Factor, ratio: int) -> torch.Tensor:
    if isinstance(factor, Mapping):
        factor = next(values for key, values in factor.items() if str(key) == str(ratio))
    return per_channel(factor)


def _inverse(std: Sequence[float]) -> list[float]:
    return [1 / one if one > 0 else 1.0 for one in std]


def _numbers(factor: Factor) -> list[float]:
    if isinstance(factor, Mapping):
        return [number for values in factor.values() for number in values]
    return [*factor] if isinstance(factor, Sequence) else [factor]
