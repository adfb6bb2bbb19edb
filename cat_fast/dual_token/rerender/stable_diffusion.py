"""Back end of a Stable Diffusion folder: AutoencoderKL, UNet, scheduler, and CLIP's text model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from cat_fast.dual_token.rerender.backend import Size, model_fingerprint
from cat_fast.dual_token.rerender.trajectory import Trajectory, make_trajectory
from cat_fast.dual_token.semantic.text_target import StableDiffusionText, TextTarget
from cat_fast.errors import UserError, first_line


class StableDiffusionBackend:
    """Stable Diffusion 1 or 2, frozen. Weights are read from safetensors files only, which hold no code.

    Args:
        folder: folder of a `StableDiffusionPipeline`.
        device: device of its models.
        dtype: dtype of the UNet; the autoencoder and the text encoder stay in fp32.

    Raises:
        UserError: a part is missing, damaged, or of another class.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.folder = folder
        _check_index(folder)
        try:
            vae: Any = AutoencoderKL.from_pretrained(folder, subfolder="vae", use_safetensors=True)
            unet: Any = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
            self.schedule: Any = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{folder}: cannot be loaded ({first_line(error)})") from error
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.unet = unet.to(device, dtype).eval().requires_grad_(False)
        self._text = StableDiffusionText(folder)
        self._text.model.to(device)
        if self._text.width != self.unet.config.cross_attention_dim:
            raise UserError(
                f"{folder}: its text encoder has {self._text.width} features, its UNet expects"
                f" {self.unet.config.cross_attention_dim}; use parts that were trained together"
            )
        self._null: Tensor | None = None

    @property
    def name(self) -> str:
        return str(self.folder)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def fingerprint(self) -> str:
        return model_fingerprint((self.vae, self.unet), self.schedule, self._text)

    @property
    def text_target(self) -> TextTarget:
        return self._text

    @property
    def factor(self) -> int:
        """Pixels per latent position, per side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_size(self) -> Size:
        side = self.unet.config.sample_size * self.factor
        return side, side

    def check_size(self, size: Size) -> None:
        unit = self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        for name, side in zip(("height", "width"), size, strict=True):
            if side < unit or side % unit:
                raise UserError(f"{name} of {side} px: expected a multiple of {unit} px")

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        return self.unet.config.in_channels, size[0] // self.factor, size[1] // self.factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        mode = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist.mode()
        shift = self.vae.config.shift_factor or 0.0
        return ((mode - shift) * self.vae.config.scaling_factor).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        z = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + (
            self.vae.config.shift_factor or 0.0
        )
        return self.vae.decode(z).sample.float()

    def trajectory(self, steps: int, size: Size, equations: str) -> Trajectory:
        return make_trajectory(self.schedule, steps, equations)

    @torch.no_grad()
    def predict(self, latents: Tensor, timestep: float, conditions: Sequence[Tensor] | None) -> Tensor:
        if conditions is None:
            if self._null is None:
                self._null = self._text.states([""])[0]
            conditions = [self._null] * len(latents)
        states = torch.stack(list(conditions)).to(self.device, self.unet.dtype)
        time = torch.tensor(int(timestep), device=self.device)
        output = self.unet(latents.to(self.unet.dtype), time, encoder_hidden_states=states)
        return output.sample.float()


def _check_index(folder: Path) -> None:
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found = {name: index[name][1] for name in ("vae", "unet", "text_encoder")}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{folder}: not a Stable Diffusion folder ({first_line(error)})") from error
    expected = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"}
    for name, kind in expected.items():
        if found[name] != kind:
            raise UserError(f"{folder}: {name} is a {found[name]}, expected a {kind}")
