"""The stages of one request: prepare, denoise_step, scheduler_step and decode.

They have the names of vLLM-Omni's contract for step-wise pipelines. Every image that this package draws
passes through them, whether it is drawn by `CATPipeline`, on the command line or by the server.
"""

import threading
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, Protocol

import torch

from cat_fast.data.latents.scale import LatentScale
from cat_fast.errors import UserError
from cat_fast.generator.captured_step import captured_step, predict
from cat_fast.generator.dit import DiT
from cat_fast.generator.packed_text import PackedText
from cat_fast.generator.sampling import SamplingState, denoise_step, draw_noise, prepare, scheduler_step
from cat_fast.generator.solvers import set_steps
from cat_fast.generator.step_pack import Filling
from cat_fast.generator.text_cache import TextCache
from cat_fast.inference.engine.pace import HostPace
from cat_fast.inference.engine.request import EngineRequest
from cat_fast.kernels.linear.rounding import row_invariant_block
from cat_fast.packing import PackedSequence
from cat_fast.tokenizer.autoencoder import NestedAutoencoderKL
from cat_fast.tokenizer.pipeline_config import upcast

ROWS = 16
"""Smallest block that steps are filled up to: fp32 matrix products of MKL and OpenBLAS take another path
below 16 rows, and element-wise kernels another one below a vector."""
TEXT_BYTES = 16 << 20
_NOT_FINITE = (
    "a latent contains NaN or infinite values; lower guidance_scale, or check the pipeline's weights"
)


class Models(Protocol):
    """The parts of a `CATPipeline` that the stages use."""

    vae: NestedAutoencoderKL
    transformer: DiT
    scheduler: Any
    text_encoder: Any

    @property
    def _execution_device(self) -> torch.device: ...


class Stages:
    """Stages on the models of a pipeline.

    Args:
        pipeline: a `CATPipeline`.
        rows: sequences and tokens of a step are filled up to multiples of this; by default a block in which
            the matrix products of this machine round alike. `invariance.self_test` tries it with the models.
        decode_batch: images per call of the decoder; by default 8 on a GPU, else 1, because convolutions on
            the CPU gain nothing from batches.
        buckets: fill steps up to a few sizes; by default on a GPU, where they are captured as CUDA graphs.
    """

    def __init__(
        self,
        pipeline: Models,
        *,
        rows: int | None = None,
        decode_batch: int | None = None,
        buckets: bool | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.device = pipeline._execution_device
        self.rows = rows or _row_block(pipeline.transformer.dtype, self.device)
        on_gpu = self.device.type == "cuda"
        self.buckets = on_gpu if buckets is None else buckets
        self.captured = captured_step(pipeline.transformer) if on_gpu and self.buckets else None
        """Forward passes as CUDA graphs; None where they run eagerly."""
        self.filled_rows = 0
        """Tokens of all forward passes, padding counted."""
        self.decode_batch = decode_batch or (1 if self.device.type == "cpu" else 8)
        self.batched_shapes: frozenset[tuple[int, torch.Size]] | None = None
        """Ratios and shapes of latents that are decoded in batches; None for all."""
        self._pace = HostPace(self.device)
        encoder = pipeline.text_encoder
        # each prompt is encoded at its own length: in a batch, its states would depend on the others
        self._encode = None if encoder is None else TextCache(encoder, TEXT_BYTES)
        self._scheduler = lru_cache(64)(lambda name, steps: set_steps(pipeline.scheduler, name, steps))
        config = pipeline.transformer.config
        self.vae_lock = threading.Lock()
        """Held while the autoencoder runs: upcasting changes its weights for the time of a call."""
        self.decoding_seconds = 0.0
        """Time in the decoder, waiting for `vae_lock` not counted."""
        self._scale = LatentScale(config.shift_factor, config.scaling_factor)

    @property
    def patch_size(self) -> int:
        return self.pipeline.transformer.config.patch_size

    @property
    def filling(self) -> Filling:
        """Sizes that steps are filled up to."""
        return Filling(self.rows, self.buckets)

    def check(self, request: EngineRequest) -> None:
        """Raise UserError if the scheduler cannot take as many steps."""
        self._scheduler(request.scheduler, request.num_inference_steps)

    def prepare(self, request: EngineRequest) -> SamplingState:
        """Encode the text and draw the initial noise of a request."""
        transformer = self.pipeline.transformer
        text = None
        if self._encode is not None:
            text = self._encode([request.sample.text]).tokens.to(self.device, transformer.dtype)
        return prepare(
            transformer,
            request.sample,
            self._scheduler(request.scheduler, request.num_inference_steps),
            guidance=request.guidance_scale,
            guidance_channels=request.guidance_channels,
            text=text,
            noise=request.noise,
            device=self.device,
        )

    def denoise_step(self, states: Sequence[SamplingState]) -> list[torch.Tensor]:
        """Return the guided prediction (n, C) of each state, from one forward pass over all of them."""
        predictions = denoise_step(
            self.pipeline.transformer, states, filling=self.filling, forward=self._forward
        )
        self._pace.step()
        return predictions

    def _forward(self, packed: PackedSequence, text: PackedText | None) -> torch.Tensor:
        self.filled_rows += packed.num_tokens
        return (self.captured or partial(predict, self.pipeline.transformer))(packed, text)

    def draw_noise(self, states: Sequence[SamplingState]) -> None:
        """Draw the noise of the next scheduler step of all states at once."""
        draw_noise(states)

    def scheduler_step(self, state: SamplingState, prediction: torch.Tensor) -> None:
        """Advance one state by one step."""
        scheduler_step(state, prediction)

    def latent(self, state: SamplingState, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Return the latent (c, h, w), float32, of a state or of other tokens of its shape.

        Raises:
            UserError: it contains NaN or infinite values.
        """
        latent = state.latent(self.patch_size, tokens)
        if not torch.isfinite(latent).all():
            raise UserError(_NOT_FINITE)
        return latent

    def decode_batch_of(self, ratio: int, shape: torch.Size) -> int:
        """Return the number of latents of a shape per call of the decoder."""
        known = self.batched_shapes is None or (ratio, shape) in self.batched_shapes
        return self.decode_batch if known else 1

    @torch.no_grad()
    def decode(self, latents: Sequence[torch.Tensor], ratio: int) -> list[torch.Tensor]:
        """Decode latents (c, h, w) of one ratio and shape; return images (3, H, W) in [-1, 1].

        Raises:
            UserError: the images contain NaN or infinite values.
        """
        vae: Any = self.pipeline.vae
        if hasattr(vae, "_hf_hook"):  # offloaded: accelerate's hook moves the model on `forward` only
            vae._hf_hook.pre_forward(vae)
        images: list[torch.Tensor] = []
        batch = self.decode_batch_of(ratio, latents[0].shape)
        for start in range(0, len(latents), batch):
            z = self._scale.undo(torch.stack(list(latents[start : start + batch])), ratio)
            with self.vae_lock:
                started = time.perf_counter()
                with upcast(vae):
                    decoded = vae.decode(z.to(vae.dtype), ratio).sample
                finite = bool(torch.isfinite(decoded).all())  # waits for a GPU
                self.decoding_seconds += time.perf_counter() - started
            if not finite:
                raise UserError(
                    f"the decoded images hold NaN or infinite values in {vae.dtype};"
                    " load the pipeline in float32 or bfloat16"
                )
            images += decoded
        return images


def _row_block(dtype: torch.dtype, device: torch.device) -> int:
    """Return a block of rows in which products round alike, ROWS if there is none."""
    found = row_invariant_block(dtype) if device.type == "cpu" else None
    return max(ROWS, found or ROWS)
