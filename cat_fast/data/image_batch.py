"""What training gets from a source of images: its batches, and what every source offers."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PictureBatch:
    """What one rank trains on in one step."""

    ratio: int
    pixels: Tensor
    """(B, 3, H, W) on the CPU: uint8, or float32 in [-1, 1]."""
    keys: list[str]
    """Names of the pictures, such as a diagnosis would give."""
    data_seconds: float
    """How long the training process waited for them."""
    pictures_per_second: float
    """How many such pictures this rank's loader could make: a step should need fewer."""
    counts: bool = True
    """Whether the step is trained on them: not where a rank only keeps the others company."""
    skipped: int = 0
    """Samples that this rank has passed over since training began, as they could not be used."""

    def on(self, device: torch.device) -> Tensor:
        """The pictures on a device, (B, 3, H, W) float32 in [-1, 1], channels last."""
        pixels = self.pixels.to(device, memory_format=torch.channels_last, non_blocking=True)
        return pixels.float().div_(127.5).sub_(1.0) if pixels.dtype == torch.uint8 else pixels


class PictureSource(Protocol):
    """Batches of one rank, in the order of the steps."""

    @property
    def ratios(self) -> list[int]:
        """Those that batches can have, ascending; the same on all ranks."""
        ...

    def batch(self, step: int) -> PictureBatch:
        """The next one; its number `step` seeds what is random in it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch, as JSON."""
        ...

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """Return a function that makes the `state_dict` of now, at any later time; cheap in every step."""
        ...

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states that all ranks of a run saved, in their order."""
        ...

    def close(self) -> None:
        """End processes and threads."""
        ...


def fingerprint(names: Iterable[str]) -> str:
    """Of names in their order."""
    # Those of files may be any bytes, which Python holds as lone surrogates.
    return hashlib.sha256("\n".join(names).encode(errors="surrogatepass")).hexdigest()[:16]


def last_part(name: str) -> str:
    """Of a path or URL: a set that has moved is the same set."""
    return name.rpartition("/")[2]
