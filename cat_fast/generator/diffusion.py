"""The noise schedules and the training loss on packed batches.

Latents here are as the model sees them: shifted and scaled (`DiT.config.shift_factor`, `scaling_factor`).
"""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn

from cat_fast.errors import UserError
from cat_fast.generator.packed_text import PackedText
from cat_fast.packing import PackedSequence

Schedule = DDPMScheduler | FlowMatchEulerDiscreteScheduler
"""The noise levels, and with them what the model predicts: a diffusers scheduler, which is saved with it."""
Weighting = Literal["token", "image"]
PREDICTIONS = ("epsilon", "v_prediction", "flow")
WEIGHTINGS = ("token", "image")
STEPS = 1000


def make_schedule(prediction: str = "epsilon") -> Schedule:
    """The schedule of a run that predicts

    - `epsilon`, the noise: the paper's, `paper_schedule()`;
    - `v_prediction`, sqrt(a) noise - sqrt(1 - a) latent, on the same noise levels (Salimans & Ho, 2022);
    - `flow`, noise - latent, on straight paths between them (rectified flow: Liu et al., 2023).

    Raises:
        UserError: another prediction.
    """
    if prediction not in PREDICTIONS:
        raise UserError(f"prediction {prediction!r}: expected {', '.join(PREDICTIONS)}")
    if prediction == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS)
    return paper_schedule(prediction)


def load_schedule(folder: str | Path) -> Schedule:
    """What `save_pretrained` of a schedule wrote.

    Raises:
        UserError: the folder holds none that a generator can have been trained on.
    """
    config = Path(folder) / "scheduler_config.json"
    try:
        name = json.loads(config.read_text(encoding="utf-8"))["_class_name"]
        kind = {one.__name__: one for one in (DDPMScheduler, FlowMatchEulerDiscreteScheduler)}[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{config}: no schedule of a generator ({error})") from error
    return kind.from_pretrained(str(folder))


def paper_schedule(prediction: str = "epsilon") -> DDPMScheduler:
    """DDPM with 1000 steps, epsilon prediction, cosine betas and leading spacing (the paper's section 4).

    beta_start and beta_end are the published values; the cosine schedule does not read them. The schedule's
    last steps hold almost no signal, and dividing by it magnifies the error of the noise estimate: so clean
    latents predicted in sampling are clipped, at 16 of their standard deviations, where no real one lies.
    """
    return DDPMScheduler(
        num_train_timesteps=STEPS,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction,
        timestep_spacing="leading",
        clip_sample=True,
        clip_sample_range=16.0,
    )


class DiffusionLoss(NamedTuple):
    """What `diffusion_loss` returns."""

    loss: torch.Tensor
    """Scalar, mean over this batch under the weighting."""
    per_sequence: torch.Tensor
    """(S,) float32, detached: each sequence's mean squared error, times its min-SNR weight."""
    timesteps: torch.Tensor
    """(S,): the timestep drawn for each sequence, int64, or float32 in a flow."""


def diffusion_loss(
    model: nn.Module,
    packed: PackedSequence,
    labels: torch.Tensor | None,
    schedule: Schedule,
    *,
    text: PackedText | None = None,
    weighting: Weighting = "token",
    min_snr_gamma: float = 0.0,
    generator: torch.Generator | None = None,
) -> DiffusionLoss:
    """Mean squared error of the prediction, at one random timestep for each sequence.

    ``weighting="token"`` is one mean over all tokens of the batch, so a 1024-token image counts sixteen
    times a 64-token one; ``"image"`` gives every image the same weight. Token weighting is taken for the
    paper's: it trains every model on the same number of tokens a step (64 x 4096) with the plain MSE, and the
    mean over such a batch divides by that fixed number. Under image weighting the gradient of a token would
    shrink with the size of its image, and with it the share of the 8x latents. Sequences with a `weight`
    count as many times. Over several batches the exact mean weighs each by its `total_weight`.

    Args:
        model: a `DiT`, or a wrapper called like one.
        packed: clean latents in the model's scale.
        labels: (S,) int64; `packed.label` if None.
        schedule: gives the noise levels, and says what is predicted.
        text: of a model with text.
        weighting: "token" or "image".
        min_snr_gamma: sequences with more signal than so many times the noise count as if they had no more, 5
            in the published runs (Hang et al., 2023); 0 is off.
        generator: source of timesteps, noise and label dropout, in this order; torch's default generators if
            None.

    Raises:
        UserError: unknown weighting, a schedule of another prediction, or min-SNR in a flow.
    """
    if weighting not in WEIGHTINGS:
        raise UserError(f"weighting {weighting!r}: expected 'token' or 'image'")
    source = packed.device if generator is None else generator.device
    index = packed.sequence_index()
    timesteps = _draw_timesteps(schedule, len(packed), generator, source).to(packed.device)
    noise = torch.randn(packed.tokens.shape, generator=generator, device=source).to(packed.tokens)
    noisy, target = _noised(schedule, packed.tokens, noise, timesteps[index])
    predicted = model(packed.replace(tokens=noisy), timesteps, labels, text, generator=generator)

    # the error in fp32 whatever the model computes in: it spans four orders of magnitude over the timesteps
    per_token = (predicted.float() - target.float()).square().mean(1)
    if min_snr_gamma:
        per_token = per_token * _min_snr(schedule, timesteps, min_snr_gamma)[index]
    lengths = packed.cu_seqlens.diff()
    per_sequence = per_token.new_zeros(len(packed)).index_add(0, index, per_token) / lengths
    if packed.weight is not None:
        weights = sequence_weights(packed, weighting)
        loss = (per_sequence * weights).sum() / weights.sum()
    else:
        loss = per_token.mean() if weighting == "token" else per_sequence.mean()
    return DiffusionLoss(loss, per_sequence.detach(), timesteps)


def sequence_weights(packed: PackedSequence, weighting: Weighting) -> torch.Tensor:
    """(S,) float32: what each sequence's error counts in the mean."""
    lengths = packed.cu_seqlens.diff().float()
    weights = lengths if weighting == "token" else torch.ones_like(lengths)
    return weights if packed.weight is None else weights * packed.weight


def total_weight(packed: PackedSequence, weighting: Weighting) -> float:
    """What the mean of a batch divides by: its tokens or images, or their weights."""
    if packed.weight is None:
        return packed.num_tokens if weighting == "token" else len(packed)
    return sequence_weights(packed, weighting).double().sum().item()


def _draw_timesteps(
    schedule: Schedule, count: int, generator: torch.Generator | None, device: torch.device
) -> torch.Tensor:
    steps = schedule.config["num_train_timesteps"]
    if isinstance(schedule, FlowMatchEulerDiscreteScheduler):
        return torch.rand(count, generator=generator, device=device) * steps
    return torch.randint(steps, (count,), generator=generator, device=device)


def _noised(
    schedule: Schedule, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy tokens (T, C), and what the model is to predict of them; `timesteps` (T,)."""
    if isinstance(schedule, FlowMatchEulerDiscreteScheduler):
        sigma = (timesteps / schedule.config["num_train_timesteps"]).to(clean.dtype)[:, None]
        return (1 - sigma) * clean + sigma * noise, noise - clean
    noisy = schedule.add_noise(clean, noise, timesteps)  # type: ignore[arg-type]
    prediction = schedule.config["prediction_type"]
    if prediction == "epsilon":
        return noisy, noise
    if prediction == "v_prediction":
        return noisy, schedule.get_velocity(clean, noise, timesteps)  # type: ignore[arg-type]
    raise UserError(f"prediction_type {prediction!r}: expected 'epsilon' or 'v_prediction'")


def _min_snr(schedule: Schedule, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """(S,) min(SNR, gamma) / SNR of a predicted noise, / (SNR + 1) of a predicted velocity."""
    if isinstance(schedule, FlowMatchEulerDiscreteScheduler):
        raise UserError("min_snr_gamma: a weight of noise levels in DDPM's schedule; a flow has none")
    alphas: Any = schedule.alphas_cumprod.to(timesteps.device)
    snr = alphas[timesteps] / (1 - alphas[timesteps])
    shift = 1 if schedule.config["prediction_type"] == "v_prediction" else 0
    return snr.clamp(max=gamma) / (snr + shift)
