"""Errors of a round trip: inversion and denoising with the same predictions, which would return its start if
steps were infinitely small.

Two cases: the exact predictions for data of unit variance, and a small Stable Diffusion with random weights.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cat_fast.dual_token.rerender.backend import Backend
from cat_fast.dual_token.rerender.rerender import denoise, invert
from cat_fast.dual_token.rerender.trajectory import Trajectory, make_trajectory
from cat_fast.dual_token.resize import resize

STEPS = (20, 50, 200)
TEXT_WIDTH, TEXT_LENGTH = 16, 12
"""Features and number of the text states of `save_tiny_stable_diffusion`."""


def stable_diffusions_schedule() -> DDIMScheduler:
    """Return the noise schedule of Stable Diffusion."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def exact_error(
    schedule: Any,
    kind: str,
    steps: int,
    shift: float | None = None,
    source_timestep: bool = False,
    fixed_point: int = 0,
) -> float:
    """Return the relative error of a round trip of data of unit variance, whose exact prediction is known.

    Args:
        kind: `epsilon` or `flow`.
        shift: of a flow's noise levels.
        source_timestep: predict at the level where an inversion step starts, in place of where it ends.
        fixed_point: fixed-point iterations per inversion step.
    """
    trajectory = make_trajectory(schedule, steps, shift=shift)
    torch.manual_seed(0)
    z = torch.randn(1000, dtype=torch.float64)
    back = _round_trip(trajectory, _exact(trajectory, kind), z, source_timestep, fixed_point)
    return _relative(back, z)


def model_error(backend: Backend, guides: Tensor, steps: int, strength: float = 1.0) -> float:
    """Return the relative error of a round trip of the latents of images, both directions unconditional.

    Args:
        guides: (B, 3, h, w) in [-1, 1], enlarged to the model's size.
        strength: fraction of the noise levels.
    """
    size = backend.default_size
    clean = backend.encode(resize(guides, size))
    trajectory, top = backend.trajectory(steps, size, "ddim"), int(strength * steps)
    noisy = invert(backend, trajectory, clean, top)
    return _relative(denoise(backend, trajectory, noisy, top, None, 1.0, [], size), clean)


def example_guides(count: int = 1) -> Tensor:
    """Return guides (count, 3, 4, 4) of random colours."""
    torch.manual_seed(0)
    return torch.rand(count, 3, 4, 4) * 2 - 1


def save_tiny_stable_diffusion(root: Path) -> Path:
    """Write a `StableDiffusionPipeline` with random weights, for images of 16 px; return its folder."""
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "r", "e", "re", "d</w>", "red</w>"]
    (root / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (root / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    tokenizer = CLIPTokenizer(
        str(root / "vocab.json"),
        str(root / "merges.txt"),
        model_max_length=TEXT_LENGTH,
        unk_token="<|endoftext|>",
    )
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=TEXT_WIDTH, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=TEXT_LENGTH, bos_token_id=0, eos_token_id=1,
            pad_token_id=1,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=2, sample_size=16,
        layers_per_block=1, scaling_factor=0.5,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4, norm_num_groups=2,
    )  # fmt: skip
    pipeline: Any = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=stable_diffusions_schedule(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(root / "pipe")
    return root / "pipe"


def _exact(trajectory: Trajectory, kind: str) -> Callable[[Tensor, int], Tensor]:
    """Return the exact prediction for clean latents of unit variance in every coordinate."""

    def predict(z: Tensor, i: int) -> Tensor:
        s = trajectory.noise_at(i)
        if kind == "flow":
            return (s - (1 - s)) / ((1 - s) ** 2 + s**2) * z
        return s * z

    return predict


def _round_trip(
    trajectory: Trajectory,
    predict: Callable[[Tensor, int], Tensor],
    z: Tensor,
    source_timestep: bool,
    fixed_point: int,
) -> Tensor:
    n = trajectory.num_steps
    for i in range(1, n + 1):
        level = max(i - 1, 1) if source_timestep else i
        result = trajectory.invert(z, predict(z, level), i)
        for _ in range(fixed_point):
            result = trajectory.invert(z, predict(result, i), i)
        z = result
    for i in range(n, 0, -1):
        z = trajectory.denoise(z, predict(z, i), i, None)
    return z


def _relative(back: Tensor, start: Tensor) -> float:
    return ((back - start).norm() / start.norm()).item()
