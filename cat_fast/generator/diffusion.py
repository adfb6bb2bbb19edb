"""The noise schedule of the paper and the training loss on packed batches.

Latents here are as the model sees them: shifted and scaled (`DiT.config.shift_factor`, `scaling_factor`).
"""

from typing import Literal, NamedTuple

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from cat_fast.errors import UserError
from cat_fast.packing import PackedSequence

Weighting = Literal["token", "image"]


def paper_schedule() -> DDPMScheduler:
    """DDPM with 1000 steps, epsilon prediction, cosine betas and leading spacing (the paper's section 4).

    beta_start and beta_end are the published values; the cosine schedule does not read them. The schedule's
    last steps hold almost no signal, and dividing by it magnifies the error of the noise estimate: so clean
    latents predicted in sampling are clipped, at 16 of their standard deviations, where no real one lies.
    """
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        timestep_spacing="leading",
        clip_sample=True,
        clip_sample_range=16.0,
    )


class EpsilonLoss(NamedTuple):
    """What `epsilon_loss` returns."""

    loss: torch.Tensor
    """Scalar, mean over this batch under the weighting."""
    per_sequence: torch.Tensor
    """(S,) float32, detached: each sequence's mean squared error."""
    timesteps: torch.Tensor
    """(S,) int64: the timestep drawn for each sequence."""
    weight: int
    """What the mean divides by: tokens or images of this batch. Over several ranks the exact mean is
    sum(loss * weight) / sum(weight)."""


def epsilon_loss(
    model: nn.Module,
    packed: PackedSequence,
    labels: torch.Tensor | None,
    scheduler: DDPMScheduler,
    *,
    weighting: Weighting = "token",
    generator: torch.Generator | None = None,
) -> EpsilonLoss:
    """Mean squared error of the predicted noise, at one random timestep for each sequence.

    ``weighting="token"`` is one mean over all tokens of the batch, so a 1024-token picture counts sixteen
    times a 64-token one; ``"image"`` gives every picture the same weight. Token weighting is taken for the
    paper's: it trains every model on the same number of tokens a step (64 x 4096) with the plain MSE, and the
    mean over such a batch divides by that fixed number. Under image weighting the gradient of a token would
    shrink with the size of its picture, and with it the share of the 8x latents.

    Args:
        model: a `DiT`, or a wrapper called like one.
        packed: clean latents in the model's scale.
        labels: (S,) int64; `packed.label` if None.
        scheduler: gives the noise levels; must predict epsilon.
        weighting: "token" or "image".
        generator: source of timesteps, noise and label dropout, in this order; torch's default generators if
            None.

    Raises:
        UserError: unknown weighting, or a scheduler of another prediction type.
    """
    if weighting not in ("token", "image"):
        raise UserError(f"weighting {weighting!r}: expected 'token' or 'image'")
    if scheduler.config["prediction_type"] != "epsilon":
        raise UserError(f"prediction_type {scheduler.config['prediction_type']!r}: expected 'epsilon'")
    source = packed.device if generator is None else generator.device
    steps = scheduler.config["num_train_timesteps"]
    timesteps = torch.randint(steps, (len(packed),), generator=generator, device=source).to(packed.device)
    noise = torch.randn(packed.tokens.shape, generator=generator, device=source).to(packed.tokens)

    index = packed.sequence_index()
    noisy = scheduler.add_noise(packed.tokens, noise, timesteps[index])  # type: ignore[arg-type]
    predicted = model(packed.replace(tokens=noisy), timesteps, labels, generator=generator)

    # the error in fp32 whatever the model computes in: it spans four orders of magnitude over the timesteps
    per_token = (predicted.float() - noise.float()).square().mean(1)
    total = per_token.new_zeros(len(packed)).index_add(0, index, per_token)
    per_sequence = total / packed.cu_seqlens.diff()
    loss = per_token.mean() if weighting == "token" else per_sequence.mean()
    weight = packed.num_tokens if weighting == "token" else len(packed)
    return EpsilonLoss(loss, per_sequence.detach(), timesteps, weight)
