"""Noise schedules and the training loss on packed batches.

Latents are in the model's scale, after `DiT.config.shift_factor` and `scaling_factor` are applied.
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
"""The noise levels and the prediction target: a diffusers scheduler, saved next to the model."""
Weighting = Literal["token", "image"]
PREDICTIONS = ("epsilon", "v_prediction", "flow")
WEIGHTINGS = ("token", "image")
TIMESTEP_DRAWS = ("uniform", "logit_normal")
"""Distributions of a flow's timesteps in training; the second is that of Stable Diffusion 3 (Esser et al.,
2024), the sigmoid of a standard normal number, which prefers the middle."""
CAT_BETAS, ORIGINAL_DIT_BETAS = "squaredcos_cap_v2", "linear"
BETA_SCHEDULES = (CAT_BETAS, ORIGINAL_DIT_BETAS)
"""Betas of CAT and of the original DiT, under diffusers' names."""
STEPS = 1000
CLIP_RANGE = 16.0
"""Limit of predicted clean latents in sampling, in the model's scale, in which latents have a standard
deviation of about 1."""


def make_schedule(prediction: str = "epsilon", beta_schedule: str = CAT_BETAS) -> Schedule:
    """Return the training schedule for a prediction target and a beta schedule.

    - `epsilon`: the noise, as CAT and the original DiT predict it;
    - `v_prediction`: sqrt(a) noise - sqrt(1 - a) latent, on the same noise levels (Salimans & Ho, 2022);
    - `flow`: noise - latent, on straight paths between them (rectified flow; Liu et al., 2023).

    The betas are `squaredcos_cap_v2`, the cosine schedule of CAT (`paper_schedule`), or `linear`, from 1e-4
    to 0.02 in 1000 steps: the schedule of the original DiT and of its published weights. In other respects
    both have CAT's conventions.

    Raises:
        UserError: unknown prediction target or beta schedule, or other betas than the default with a flow,
            which has none.
    """
    for name, given, known in (
        ("prediction", prediction, PREDICTIONS),
        ("beta_schedule", beta_schedule, BETA_SCHEDULES),
    ):
        if given not in known:
            raise UserError(f"{name}: expected one of {', '.join(known)}, got {given!r}")
    if prediction != "flow":
        return _ddpm(prediction, beta_schedule)
    if beta_schedule != CAT_BETAS:
        raise UserError(
            f"beta_schedule: a flow has no betas; expected the default, {CAT_BETAS}, got {beta_schedule!r}"
        )
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS)


def load_schedule(folder: str | Path) -> Schedule:
    """Load a schedule written by its `save_pretrained`.

    Raises:
        UserError: the folder has no scheduler config, or one of a class that `make_schedule` does not return.
    """
    config = Path(folder) / "scheduler_config.json"
    try:
        name = json.loads(config.read_text(encoding="utf-8"))["_class_name"]
        kind = {one.__name__: one for one in (DDPMScheduler, FlowMatchEulerDiscreteScheduler)}[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{config}: not the config of a DDPMScheduler or FlowMatchEulerDiscreteScheduler ({error}); "
            "training saves it next to the model, for published weights save that of make_schedule"
        ) from error
    return kind.from_pretrained(str(folder))


def paper_schedule(prediction: str = "epsilon") -> DDPMScheduler:
    """Return DDPM with 1000 steps, epsilon prediction, cosine betas and leading spacing (section 4).

    beta_start and beta_end are the published values; the cosine schedule ignores them. The schedule's last
    steps contain almost no signal, and dividing by it magnifies the error of the predicted noise. Predicted
    clean latents are therefore clipped in sampling, at `CLIP_RANGE` in the model's scale, far outside the
    range of real latents.
    """
    return _ddpm(prediction, CAT_BETAS)


def _ddpm(prediction: str, beta_schedule: str) -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=STEPS,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=beta_schedule,
        prediction_type=prediction,
        timestep_spacing="leading",
        clip_sample=True,
        clip_sample_range=CLIP_RANGE,
    )


def check_betas(model: nn.Module, schedule: Schedule) -> None:
    """Check that a scheduler has the betas that the model was trained with, if its config records them.

    Raises:
        UserError: it has others.
    """
    config: Any = model.config
    trained = getattr(config, "beta_schedule", None)
    given = schedule.config.get("beta_schedule")
    if trained not in (None, given):
        raise UserError(
            f"scheduler: the model was trained with {trained} betas, the scheduler has {given or 'none'}; use"
            f" the scheduler/ next to the model, or make_schedule(beta_schedule={trained!r})"
        )


def shift_noise(sigma: torch.Tensor, lengths: torch.Tensor, shift_tokens: float) -> torch.Tensor:
    """Return the noise levels of a flow, shifted by the token count of each sequence.

    s * sigma / (1 + (s - 1) * sigma) with s = sqrt(length / shift_tokens) (Esser et al., 2024, equation 23;
    LGM and NoiseShift report the same dependence). A longer sequence describes the same image redundantly, so
    that its content is visible through more noise: in one packed batch, 8x needs more noise than 32x.

    Args:
        sigma: noise levels in [0, 1], (S,).
        lengths: number of tokens of each sequence, (S,).
        shift_tokens: number of tokens at which nothing is shifted.
    """
    s = (lengths.to(sigma.dtype) / shift_tokens).sqrt()
    return s * sigma / (1 + (s - 1) * sigma)


class DiffusionLoss(NamedTuple):
    """Result of `diffusion_loss`."""

    loss: torch.Tensor
    """Scalar: the weighted mean over this batch."""
    per_sequence: torch.Tensor
    """(S,) float32, detached: mean squared error of each sequence, times its min-SNR weight."""
    timesteps: torch.Tensor
    """(S,): the timestep drawn for each sequence, int64, or float32 for a flow."""


def diffusion_loss(
    model: nn.Module,
    packed: PackedSequence,
    labels: torch.Tensor | None,
    schedule: Schedule,
    *,
    text: PackedText | None = None,
    weighting: Weighting = "token",
    min_snr_gamma: float = 0.0,
    timestep_draw: str = "uniform",
    noise_shift_tokens: float | None = None,
    generator: torch.Generator | None = None,
) -> DiffusionLoss:
    """Compute the mean squared error of the prediction, at one random timestep per sequence.

    ``weighting="token"`` is the mean over all tokens of the batch, so a 1024-token image counts sixteen times
    as much as a 64-token one. ``"image"`` gives every image the same weight. The paper trains every model on
    the same number of tokens per step (64 x 4096) with the plain MSE, which we read as token weighting: the
    mean over such a batch divides by a fixed number. Under image weighting, the gradient of a token shrinks
    with the size of its image. A sequence's `weight` multiplies its contribution. To average over several
    batches exactly, weight each by its `total_weight`.

    Args:
        model: a `DiT`, or a wrapper with the same call signature.
        packed: clean latents in the model's scale.
        labels: (S,) int64; `packed.label` if None.
        schedule: the noise levels and the prediction target.
        text: one text per sequence, for a model with text.
        weighting: "token" or "image".
        min_snr_gamma: gamma of the weight min(SNR, gamma) / SNR, 5 in Hang et al. (2023); 0 disables it.
        timestep_draw: distribution of the timesteps, one of `TIMESTEP_DRAWS`; "uniform" unless the schedule
            is a flow.
        noise_shift_tokens: number of tokens at which a flow's noise levels are not shifted, see
            `shift_noise`; None shifts none. It is `DiT.config.noise_shift_tokens`.
        generator: source of timesteps, noise and label dropout, in this order; torch's default generators if
            None.

    Raises:
        UserError: unknown weighting, unsupported prediction type, min-SNR with a flow, or another draw or a
            shift without one.
    """
    if weighting not in WEIGHTINGS:
        raise UserError(f"weighting: expected 'token' or 'image', got {weighting!r}")
    source = packed.device if generator is None else generator.device
    index = packed.sequence_index()
    timesteps = _draw_timesteps(schedule, len(packed), timestep_draw, generator, source).to(packed.device)
    if noise_shift_tokens is not None:
        timesteps = _shift_timesteps(schedule, timesteps, packed, noise_shift_tokens)
    noise = torch.randn(packed.tokens.shape, generator=generator, device=source).to(packed.tokens)
    noisy, target = _noised(schedule, packed.tokens, noise, timesteps[index])
    noisy_batch = packed.replace(tokens=noisy)
    predicted = model(noisy_batch, timesteps, labels, text, generator=generator, return_dict=False)[0]

    # fp32 whatever the model's dtype: the error spans four orders of magnitude over the timesteps
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
    """Return the weight of each sequence's error in the mean, (S,) float32."""
    lengths = packed.cu_seqlens.diff().float()
    weights = lengths if weighting == "token" else torch.ones_like(lengths)
    return weights if packed.weight is None else weights * packed.weight


def total_weight(packed: PackedSequence, weighting: Weighting) -> float:
    """Return the divisor of a batch's mean: its number of tokens or images, or the sum of their weights."""
    if packed.weight is None:
        return packed.num_tokens if weighting == "token" else len(packed)
    return sequence_weights(packed, weighting).double().sum().item()


def _draw_timesteps(
    schedule: Schedule, count: int, draw: str, generator: torch.Generator | None, device: torch.device
) -> torch.Tensor:
    steps = schedule.config["num_train_timesteps"]
    is_flow = isinstance(schedule, FlowMatchEulerDiscreteScheduler)
    if draw not in TIMESTEP_DRAWS[: 1 + is_flow]:
        known = " or ".join(map(repr, TIMESTEP_DRAWS))
        raise UserError(f"timestep_draw: expected 'uniform', or for a flow {known}, got {draw!r}")
    if not is_flow:
        return torch.randint(steps, (count,), generator=generator, device=device)
    if draw == "logit_normal":
        return torch.randn(count, generator=generator, device=device).sigmoid() * steps
    return torch.rand(count, generator=generator, device=device) * steps


def _shift_timesteps(
    schedule: Schedule, timesteps: torch.Tensor, packed: PackedSequence, shift_tokens: float
) -> torch.Tensor:
    if not isinstance(schedule, FlowMatchEulerDiscreteScheduler):
        raise UserError("noise_shift_tokens: expected None unless the schedule is a flow")
    steps = schedule.config["num_train_timesteps"]
    return steps * shift_noise(timesteps / steps, packed.cu_seqlens.diff(), shift_tokens)


def _noised(
    schedule: Schedule, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy tokens (T, C) and the prediction target (T, C); `timesteps` is (T,)."""
    if isinstance(schedule, FlowMatchEulerDiscreteScheduler):
        sigma = (timesteps / schedule.config["num_train_timesteps"]).to(clean.dtype)[:, None]
        return (1 - sigma) * clean + sigma * noise, noise - clean
    noisy = schedule.add_noise(clean, noise, timesteps)  # type: ignore[arg-type]
    prediction = schedule.config["prediction_type"]
    if prediction == "epsilon":
        return noisy, noise
    if prediction == "v_prediction":
        return noisy, schedule.get_velocity(clean, noise, timesteps)  # type: ignore[arg-type]
    raise UserError(f"prediction_type: expected 'epsilon' or 'v_prediction', got {prediction!r}")


def _min_snr(schedule: Schedule, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the min-SNR weights (S,): min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v_prediction."""
    if isinstance(schedule, FlowMatchEulerDiscreteScheduler):
        raise UserError("min_snr_gamma: expected 0 for a flow; min-SNR weights need the DDPM noise levels")
    alphas: Any = schedule.alphas_cumprod.to(timesteps.device)
    snr = alphas[timesteps] / (1 - alphas[timesteps])
    shift = 1 if schedule.config["prediction_type"] == "v_prediction" else 0
    return snr.clamp(max=gamma) / (snr + shift)
