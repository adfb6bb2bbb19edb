"""Interface of diffusion models that re-render guides."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cat_fast.dual_token.rerender.trajectory import Trajectory
from cat_fast.dual_token.semantic.text_target import TextTarget
from cat_fast.weights.fingerprint import fingerprint

Size = tuple[int, int]
"""Height and width in pixels."""


class Backend(Protocol):
    """A frozen latent diffusion model with text conditions."""

    @property
    def name(self) -> str:
        """Folder or name, for messages."""
        ...

    @property
    def device(self) -> torch.device: ...

    def fingerprint(self) -> str:
        """Return 16 hex digits that identify its weights and settings."""
        ...

    @property
    def text_target(self) -> TextTarget:
        """Its text encoder, whose states are its conditions."""
        ...

    @property
    def default_size(self) -> Size:
        """Size of the images it was trained on."""
        ...

    def check_size(self, size: Size) -> None:
        """Raise UserError if the model cannot draw images of a size."""
        ...

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """Return channels, height and width of the latent of an image."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Return the latents (B, c, h, w), in the model's scale, of images (B, 3, H, W) in [-1, 1]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images (B, 3, H, W) of latents in the model's scale."""
        ...

    def trajectory(self, steps: int, size: Size, equations: str) -> Trajectory:
        """Return the noise levels for images of a size."""
        ...

    def predict(self, latents: Tensor, timestep: float, conditions: Sequence[Tensor] | None) -> Tensor:
        """Return the prediction (B, c, h, w) for latents at a timestep.

        Args:
            conditions: text states (n, T) per image; None for the unconditional prediction.
        """
        ...


def model_fingerprint(models: Sequence[Any], scheduler: Any, text: TextTarget, **settings: Any) -> str:
    """Return 16 hex digits that identify diffusers models, their scheduler, text encoder and settings."""
    settings |= {"text": text.fingerprint(), "num_states": text.num_states}
    for part in (*models, scheduler):
        own = {name: value for name, value in part.config.items() if not name.startswith("_")}
        settings[type(part).__name__] = own
    state = {f"{i}.{key}": x for i, model in enumerate(models) for key, x in model.state_dict().items()}
    return fingerprint(settings, state)
