"""Short trials of the nano generator's loss: which noise levels and prediction target learn fastest.

    python -m benchmarks.nano_trials --latents runs/nano_corpus_latents --out runs/nano_trials --json FILE

Trains each variant of configs/generator/nano_corpus.yaml for the same few steps, from one initialisation, on
the same batches, and compares the clean latents that they predict, at equal signal-to-noise ratios: a flow at
noise level s and a diffusion process at the timestep whose deviations of noise and signal have the ratio
s / (1 - s). Errors are relative to the variance of the latents. A second call keeps complete runs.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from benchmarks.nano.intervals import mean_with_interval, paired_difference
from benchmarks.shared import machine
from benchmarks.shared.configs import CONFIGS, generator_run
from benchmarks.shared.harness import rounded
from cat_fast.data.files import write_json
from cat_fast.data.latents.dataset import LatentDataset
from cat_fast.data.latents.scale import read_normalization
from cat_fast.errors import UserError
from cat_fast.generator import PackedText
from cat_fast.generator.diffusion import Schedule, load_schedule
from cat_fast.generator.dit import DiT
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.packing import PackedSequence

CONFIG = CONFIGS / "generator/nano_corpus.yaml"
DIFFUSION = {"loss.timestep_draw": "uniform", "loss.noise_shift_tokens": "0"}
VARIANTS: Mapping[str, Mapping[str, str]] = {
    "as configured": {},
    "no shift by token count": {"loss.noise_shift_tokens": "0"},
    "uniform noise levels": {"loss.timestep_draw": "uniform"},
    "epsilon": {**DIFFUSION, "loss.prediction": "epsilon"},
    "v-prediction": {**DIFFUSION, "loss.prediction": "v_prediction"},
    "v-prediction, min-SNR 5": {
        **DIFFUSION,
        "loss.prediction": "v_prediction",
        "loss.min_snr_gamma": "5",
    },
    "one scale for all ratios": {"data.normalized": "per_channel"},
    "average over fewer steps": {"ema_decay": "0.9"},
    "no average": {"ema_decay": "0"},
}
"""Settings that differ from the configuration."""
BASE = "as configured"
LEVELS = (0.9, 0.75, 0.5, 0.25)
"""Noise levels of a flow at which predictions are compared."""
IMAGES = 96
"""Latents per ratio."""


@dataclass(frozen=True)
class Batch:
    """Latents of one ratio with their texts and the noise that all variants get."""

    packed: PackedSequence
    text: PackedText
    noise: Tensor
    deviation: float
    """Root mean square over channels of the deviation of this ratio's latents over the dataset."""


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Short trials of the nano generator's loss.")
    parser.add_argument("--latents", type=Path, required=True, help="folder of cat-fast encode-shards")
    parser.add_argument("--out", type=Path, default=Path("runs/nano_trials"), help="folder of the runs")
    parser.add_argument("--steps", type=int, default=400, help="steps of each variant")
    parser.add_argument(
        "--only", nargs="+", choices=[n for n in VARIANTS if n != BASE], help=f"variants next to {BASE!r}"
    )
    parser.add_argument("--json", type=Path, help="file to write the results to")
    given = parser.parse_args()
    try:
        found = compare(given.latents, given.out, given.steps, given.only or list(VARIANTS))
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    if given.json:
        write_json(given.json, rounded({**found, "machine": machine.describe()}))
    return 0


def compare(latents: Path, out: Path, steps: int, only: Sequence[str]) -> dict[str, Any]:
    """Train the configured variant and those in `only`; return their errors by ratio and level.

    The differences are those to the configured one.
    """
    config = generator_run("nano_corpus", [f"data.latents={latents}", "data.tokenizer="])
    encoder = TextEncoder(config.text_encoder)
    errors: dict[str, dict[int, dict[float, list[float]]]] = {}
    for name in [BASE, *(name for name in VARIANTS if name in only and name != BASE)]:
        settings = VARIANTS[name]
        model, schedule = _train(name, settings, latents, out, steps)
        normalized = read_normalization(
            settings.get("data.normalized", config.data.normalized), "data.normalized"
        )
        data = LatentDataset(latents, normalized=normalized)
        errors[name] = {}
        for ratio in sorted(data.moments):
            batch = _batch(data, ratio, encoder, config.model["patch_size"])
            errors[name][ratio] = {level: clean_errors(model, schedule, batch, level) for level in LEVELS}
        print(name, {ratio: f"{_mean(found):.3f}" for ratio, found in errors[name].items()}, flush=True)
    return {
        "steps": steps,
        "errors": {
            name: {
                f"{ratio}x": {str(level): mean_with_interval(values) for level, values in by_level.items()}
                for ratio, by_level in found.items()
            }
            for name, found in errors.items()
        },
        "difference to the configuration": {
            name: {
                f"{ratio}x": paired_difference(_per_image(by_level), _per_image(errors[BASE][ratio]))
                for ratio, by_level in found.items()
            }
            for name, found in errors.items()
            if name != BASE
        },
        "standard deviation of the latents": {
            f"{ratio}x": float(torch.tensor(moments.std).square().mean().sqrt())
            for ratio, moments in data.moments.items()
        },
    }


@torch.no_grad()
def clean_errors(model: torch.nn.Module, schedule: Schedule, batch: Batch, level: float) -> list[float]:
    """Return the squared error of each latent's prediction from its noisy version, over the variance.

    Args:
        level: noise level of a flow of unit variance; other latents and diffusion processes get the level of
            the nearest ratio of noise to signal.
    """
    steps = schedule.config["num_train_timesteps"]
    noise_to_signal = level / (1 - level) * batch.deviation
    if isinstance(schedule, FlowMatchEulerDiscreteScheduler):
        noise = noise_to_signal / (1 + noise_to_signal)
        signal, timestep = 1 - noise, torch.tensor(noise * steps)
    else:
        alphas: Any = schedule.alphas_cumprod
        timestep = (((1 - alphas) / alphas).sqrt() - noise_to_signal).abs().argmin()
        signal, noise = float(alphas[timestep].sqrt()), float((1 - alphas[timestep]).sqrt())
    clean = batch.packed.tokens
    noisy = signal * clean + noise * batch.noise
    timesteps = timestep.expand(len(batch.packed))
    predicted = model(batch.packed.replace(tokens=noisy), timesteps, None, batch.text, return_dict=False)[0]
    if isinstance(schedule, FlowMatchEulerDiscreteScheduler):
        estimate = noisy - noise * predicted
    elif schedule.config["prediction_type"] == "epsilon":
        estimate = (noisy - noise * predicted) / signal
    else:
        estimate = signal * noisy - noise * predicted
    per_token = (estimate - clean).square().mean(1) / batch.deviation**2
    return [float(part.mean()) for part in per_token.split(batch.packed.cu_seqlens.diff().tolist())]


def _train(
    name: str, settings: Mapping[str, str], latents: Path, out: Path, steps: int
) -> tuple[DiT, Schedule]:
    """Train a variant, unless its run is complete; return the averaged model and its schedule."""
    folder = out / name.replace(",", "").replace(" ", "_")
    overrides = {
        "output_dir": str(folder),
        "data.latents": str(latents),
        "data.tokenizer": "",
        "schedule.total_steps": str(steps),
        "schedule.warmup_steps": str(steps // 10),
        **settings,
    }
    finished = subprocess.run(
        [sys.executable, "-m", "cat_fast.train", str(CONFIG), *(f"{k}={v}" for k, v in overrides.items())],
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        check=False,
    )
    if finished.returncode:
        raise UserError(f"the run of the variant {name!r} failed; its messages are above")
    model = DiT.from_pretrained(folder / "model").eval()
    return model, load_schedule(folder / "model" / "scheduler")


def _batch(data: LatentDataset, ratio: int, encoder: TextEncoder, patch_size: int) -> Batch:
    """Return latents of a ratio, evenly spaced over the dataset."""
    of_ratio = [index for index, entry in enumerate(data.entries) if entry.ratio == ratio]
    chosen = [of_ratio[i * len(of_ratio) // IMAGES] for i in range(min(IMAGES, len(of_ratio)))]
    samples = [data[i] for i in chosen]
    packed = PackedSequence.from_latents(
        [sample.latent for sample in samples],
        [ratio] * len(samples),
        patch_size,
        labels=[sample.label for sample in samples],
    )
    with torch.no_grad():
        text = encoder([data.entries[i].caption or "" for i in chosen])
    noise = torch.randn(packed.tokens.shape, generator=torch.Generator().manual_seed(ratio))
    return Batch(packed, text, noise, _deviation(data, ratio))


def _deviation(data: LatentDataset, ratio: int) -> float:
    moments = data.moments[ratio]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (moments.mean, moments.std))
    spread = data.scale.apply(mean + std, ratio) - data.scale.apply(mean, ratio)
    return float(spread.square().mean().sqrt())


def _per_image(by_level: Mapping[float, Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*by_level.values(), strict=True)]


def _mean(by_level: Mapping[float, Sequence[float]]) -> float:
    values = _per_image(by_level)
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
