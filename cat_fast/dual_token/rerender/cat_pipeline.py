"""Back end of a text-conditional pipeline of this package: packed DiT, nested VAE and text encoder."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cat_fast.data.latents.scale import LatentScale
from cat_fast.dual_token.rerender.backend import Size, model_fingerprint
from cat_fast.dual_token.rerender.trajectory import Trajectory, make_trajectory
from cat_fast.dual_token.semantic.text_target import PipelineText, TextTarget
from cat_fast.errors import UserError
from cat_fast.generator.packed_text import PackedText
from cat_fast.inference.pipeline.cat_pipeline import CATPipeline
from cat_fast.kernels.pack.op import unpack
from cat_fast.packing import PackedSequence
from cat_fast.tokenizer.pipeline_config import upcast


class CATBackend:
    """A `CATPipeline` with text, frozen, at one compression ratio.

    Images are drawn without a class; the unconditional prediction has neither class nor text.

    Args:
        pipeline: the pipeline.
        name: its folder or name.
        ratio: compression ratio of the latents; None for the lowest, which keeps the most detail.
        num_states: maximum number of text states.

    Raises:
        UserError: a pipeline without text, or a ratio that it does not have.
    """

    def __init__(
        self, pipeline: CATPipeline, name: str, ratio: int | None = None, num_states: int = 77
    ) -> None:
        if pipeline.text_encoder is None:
            raise UserError(f"{name}: expected a pipeline trained with text, got one of classes alone")
        ratios = tuple(pipeline.transformer.config.ratios)
        self.ratio = min(ratios) if ratio is None else ratio
        if self.ratio not in ratios:
            raise UserError(f"ratio {ratio}: expected one of {', '.join(map(str, ratios))}")
        self.pipeline, self._name = pipeline, name
        self._text = PipelineText(pipeline.text_encoder, num_states)
        config = pipeline.transformer.config
        self._scale = LatentScale(config.shift_factor, config.scaling_factor)
        self._patch: int = config.patch_size

    @property
    def name(self) -> str:
        return self._name

    @property
    def device(self) -> torch.device:
        return self.pipeline.transformer.device

    def fingerprint(self) -> str:
        models = self.pipeline.vae, self.pipeline.transformer
        return model_fingerprint(models, self.pipeline.scheduler, self._text, ratio=self.ratio)

    @property
    def text_target(self) -> TextTarget:
        return self._text

    @property
    def default_size(self) -> Size:
        return self.pipeline.resolution, self.pipeline.resolution

    def check_size(self, size: Size) -> None:
        unit = math.lcm(self.ratio * self._patch, max(self.pipeline.vae.ratios))
        for name, side in zip(("height", "width"), size, strict=True):
            if side < unit or side % unit:
                raise UserError(f"{name} of {side} px: expected a multiple of {unit} px")

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        channels = self.pipeline.transformer.config.in_channels
        return channels, size[0] // self.ratio, size[1] // self.ratio

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        with upcast(vae):
            x = images.to(self.device, vae.dtype)
            mode = vae.encode(x, self.ratio).latent_dist.mode()
        return self._scale.apply(mode.float(), self.ratio)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        z = self._scale.undo(latents, self.ratio)
        with upcast(vae):
            return vae.decode(z.to(vae.dtype), self.ratio).sample.float()

    def trajectory(self, steps: int, size: Size, equations: str) -> Trajectory:
        """Return the noise levels, for a flow shifted by the number of tokens as in training."""
        shift_tokens = getattr(self.pipeline.transformer.config, "noise_shift_tokens", None)
        _, height, width = self.latent_shape(size)
        tokens = height * width / self._patch**2
        shift = None if shift_tokens is None else math.sqrt(tokens / shift_tokens)
        return make_trajectory(self.pipeline.scheduler, steps, equations, shift)

    @torch.no_grad()
    def predict(self, latents: Tensor, timestep: float, conditions: Sequence[Tensor] | None) -> Tensor:
        transformer = self.pipeline.transformer
        count, null = len(latents), transformer.config.num_classes
        packed = PackedSequence.from_latents(
            list(latents), [self.ratio] * count, self._patch, labels=[null] * count
        )
        empty = torch.empty(0, self._text.width)
        states = [empty] * count if conditions is None else list(conditions)
        text = PackedText.of([own.to(self.device, transformer.dtype) for own in states])
        times = torch.full((count,), timestep, device=self.device)
        predicted = transformer(packed, times, text=text, return_dict=False)[0].float()
        grids = [(int(height), int(width)) for height, width in packed.grid.tolist()]
        return torch.stack(unpack(predicted, grids, self._patch))
