"""Training of the diffusion transformer on packed latents of mixed ratios, with a token budget per rank."""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from cat_fast.complexity import RATIOS
from cat_fast.complexity.ratios.spending import spending_notice
from cat_fast.data.latents.dataset import LatentDataset
from cat_fast.data.latents.scale import read_normalization
from cat_fast.errors import UserError
from cat_fast.generator import DiffusionLoss, DiT, PackedText, diffusion_loss, make_schedule
from cat_fast.generator.diffusion import (
    CAT_BETAS,
    CLIP_RANGE,
    Schedule,
    Weighting,
    load_schedule,
    sequence_weights,
    total_weight,
)
from cat_fast.generator.text_cache import TextCache, estimate_bytes
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.models.build import build_model
from cat_fast.models.load import load_tokenizer
from cat_fast.packing import PackedSequence
from cat_fast.tokenizer.pipeline_config import latent_scale
from cat_fast.training.checkpoints.engine_state import (
    load_engine,
    parameter_count,
    save_engine,
    saved_bytes,
)
from cat_fast.training.checkpoints.initial_settings import model_settings, require_same_settings
from cat_fast.training.checkpoints.initial_weights import load_initial_weights
from cat_fast.training.checkpoints.space import StateBytes
from cat_fast.training.checkpoints.write_errors import defer_write_errors
from cat_fast.training.config.settings import GeneratorRun
from cat_fast.training.generator.largest_batch import choose_largest, make_batch
from cat_fast.training.generator.packed_batches import PackedBatches
from cat_fast.training.generator.packed_stream import PackedStream
from cat_fast.training.health.nan_guard import discard_gradients
from cat_fast.training.metrics.flops import DiTFlops
from cat_fast.training.metrics.step_means import means_at_ratios
from cat_fast.training.rehearsal import LargestStep
from cat_fast.training.runtime.collective_errors import on_each, raise_together
from cat_fast.training.runtime.ema import EMA
from cat_fast.training.runtime.engine import in_precision, learning_rate, make_engine, set_learning_rate
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.seeding import seed_step
from cat_fast.training.runtime.stand_ins import stand_in_parameters
from cat_fast.training.runtime.step_context import describe_batch
from cat_fast.training.step import Backward

_LOG = logging.getLogger("cat_fast.training")
_FREE_OF_WEIGHTS = (
    "class_dropout_prob",
    "label_dropout_prob",
    "noise_shift_tokens",
    "scaling_factor",
    "shift_factor",
)
"""Entries of a DiT's config that a run may change when it starts from trained weights."""


class WeightedBatch(NamedTuple):
    """A batch of a step, and the weight of its loss."""

    packed: PackedSequence
    text: PackedText | None
    lengths: list[int]
    weight: float


class GeneratorTask:
    """Implements `loop.Task` for the DiT."""

    amounts = ("weight", "tokens", "images", "flops", "data_seconds")

    def __init__(self, config: GeneratorRun, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.latents = on_each(lambda: _load_latents(config, ranks), ranks)
        same = ranks.broadcast(self.latents.digest) == self.latents.digest
        different = UserError("data.latents differ from those of rank 0: all ranks must see the same files")
        raise_together(None if same else different, ranks)
        if ranks.is_main and (notice := _spending_notice(self.latents)):
            print(notice, flush=True)
        self.text_encoder = _load_text_encoder(config, self.latents, ranks)
        cache_bytes = config.text_cache_megabytes << 20
        encode = _make_caption_encoder(self.text_encoder, self.latents, cache_bytes)
        self.batches_per_step = _batches_per_step(config, ranks)
        torch.manual_seed(config.seed)
        self._derived = self._derived_arguments()
        self.arguments = {"num_classes": len(self.latents.class_names), **self._derived, **config.model}
        _check_ratios(config, self.latents, list(self.arguments.get("ratios", RATIOS)))
        model = build_model(DiT, self.arguments)
        self.initial_weights = on_each(lambda: self._load_initial_weights(model), ranks)
        self.ratios = list(model.config.ratios)
        lengths = self.latents.token_counts(model.config.patch_size)
        _check_fit(config, self.latents, model, lengths)
        if ranks.is_main:
            _warn_of_clipping(self.latents)
        self.lengths = np.asarray(lengths)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.compiled = config.compiles(ranks.device.type)
        if self.compiled:
            model.compile_repeated_blocks(dynamic=True)
            if ranks.is_main:
                print("each transformer block is compiled with torch.compile", flush=True)
        self.engine = make_engine(
            model, config.optimizer, config.deepspeed, self.batches_per_step, config.precision
        )
        defer_write_errors(self.engine, ranks)
        self.flops = DiTFlops(self.arguments)
        self.ema = EMA(self.engine.module, config.ema_decay, ranks)
        self.schedule = make_schedule(config.loss.prediction, config.loss.beta_schedule)
        self._drawn: list[WeightedBatch] = []
        self.batches = PackedBatches(
            self.latents,
            PackedStream(lengths, config.data.max_tokens, config.data.window, config.seed, ranks),
            patch_size=model.config.patch_size,
            prefetch=self.batches_per_step,
            device=ranks.device,
            encode=encode,
        )

    def _derived_arguments(self) -> dict[str, Any]:
        """Return the arguments of the model that the latents, the text encoder and the loss determine.

        Raises:
            UserError: the configuration sets one of them.
        """
        latents, flow = self.latents, self.config.loss.prediction == "flow"
        derived = {
            "in_channels": latents.entries[0].shape[0],
            "shift_factor": latents.shift_factor,
            "scaling_factor": latents.scaling_factor,
            "beta_schedule": None if flow else self.config.loss.beta_schedule,
            "tokenizer_fingerprint": latents.fingerprint,
            "text_dim": self.text_encoder.dim if self.text_encoder else None,
            "text_encoder_fingerprint": self.text_encoder.fingerprint() if self.text_encoder else None,
            "noise_shift_tokens": self.config.loss.noise_shift_tokens or None,
        }
        if duplicates := sorted(derived.keys() & self.config.model.keys()):
            raise UserError(
                f"model.{duplicates[0]}: the latents, the text encoder or the loss determine it; remove the "
                "key (data.normalized=none keeps the tokenizer's scale)"
            )
        return derived

    def _load_initial_weights(self, model: DiT) -> str | None:
        """Load `initial_weights`; return their digest, None if there are none."""
        folder, loss = self.config.initial_weights, self.config.loss
        digest = load_initial_weights(model, folder, _FREE_OF_WEIGHTS)
        if digest is None:
            return None
        trained = _describe_schedule(load_schedule(Path(folder) / "scheduler"))
        expected = _describe_schedule(make_schedule(loss.prediction, loss.beta_schedule))
        if trained != expected:
            raise UserError(
                f"initial_weights: {folder} was trained to predict {trained}, this run predicts {expected}; "
                "set loss.prediction and loss.beta_schedule as in that run"
            )
        return digest

    def draw(self, step: int) -> Sequence[float]:
        self._drawn, seconds = self._next_batches()
        self.ranks.step_context.set_batches([describe_batch(batch.packed.key or ()) for batch in self._drawn])
        amounts = {
            "weight": sum(batch.weight for batch in self._drawn),
            "tokens": sum(batch.packed.num_tokens for batch in self._drawn),
            "images": sum(len(batch.packed) for batch in self._drawn),
            "flops": sum(
                self.flops.of(batch.lengths, None if batch.text is None else _lengths(batch.text))
                for batch in self._drawn
            ),
            "data_seconds": seconds / self.ranks.world_size,
        }
        return [amounts[name] for name in self.amounts]

    def undraw(self) -> None:
        self.batches.put_back()

    def backward(self, step: int, totals: Mapping[str, float]) -> Backward:
        config, ranks = self.config, self.ranks
        drawn, self._drawn = self._drawn, []
        seed_step(config.seed, step, ranks.rank)
        set_learning_rate(self.engine, learning_rate(config.optimizer.lr, config.schedule, step))
        losses: list[torch.Tensor] = []
        by_ratio = torch.zeros(len(self.ratios), 2, dtype=torch.float64, device=ranks.device)
        for batch in drawn:
            found = self._loss(self.engine, batch.packed, batch.text)
            ranks.step_context.start_waiting()  # from here on ranks wait for each other
            # Batches hold different numbers of tokens and gradients are averaged: weigh each by its share.
            share = batch.weight * ranks.world_size * self.batches_per_step / totals["weight"]
            self.engine.backward(found.loss * share)
            by_ratio += self._by_ratio(batch.packed, found.per_sequence)
            losses.append(found.loss.detach())
            if len(losses) < self.batches_per_step:
                self.engine.step()  # only counts the backward passes
        each = torch.stack(losses)
        weighted = [loss.double() * batch.weight for loss, batch in zip(losses, drawn, strict=True)]
        loss = torch.stack(weighted).sum()
        return Backward(
            losses={"loss": each},
            engines={"generator": self.engine},
            sums=torch.cat([loss[None], by_ratio.flatten()]),
            metrics=lambda sums: self._metrics(sums, totals),
        )

    def update(self, backward: Backward, sums: torch.Tensor) -> None:
        self.engine.step()
        self.ema.update()

    def _loss(self, model: Any, packed: PackedSequence, text: PackedText | None) -> DiffusionLoss:
        return diffusion_loss(
            model,
            packed,
            None,
            self.schedule,
            text=text,
            weighting=self._weighting,
            min_snr_gamma=self.config.loss.min_snr_gamma,
            timestep_draw=self.config.loss.timestep_draw,
            noise_shift_tokens=self.config.loss.noise_shift_tokens or None,
        )

    def largest_step(self) -> LargestStep:
        chosen = choose_largest(self.lengths, self.config.data.max_tokens)
        with_text = f" with texts of {self.text_encoder.max_tokens} tokens" if self.text_encoder else ""
        return LargestStep(
            what=f"{len(chosen)} latents, {self.lengths[chosen].sum()} tokens{with_text}",
            lower="data.max_tokens",
            settings="model, loss and text_encoder",
            run=lambda: self._rehearse(chosen),
            communicates=self.ema.is_partitioned,
        )

    def _rehearse(self, chosen: Sequence[int]) -> None:
        """Run the forward and backward passes on random latents of the chosen ones' shapes; change nothing.

        Under ZeRO 3 they need the engine, and so all ranks.
        """
        device, model = self.ranks.device, self.engine.module
        entries = [self.latents.entries[index] for index in chosen]
        packed, text = make_batch(entries, model.config.patch_size, self.text_encoder, device)
        if self.ema.is_partitioned:
            self.engine.backward(self._loss(self.engine, packed, text).loss)
            discard_gradients(self.engine)
            return
        # Stand-ins and random shapes would each be compiled, which takes longer than the steps.
        eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with eager, stand_in_parameters(model):
            forward = in_precision(model, self.config.precision, device)
            self._loss(forward, packed, text).loss.backward()

    def state_bytes(self) -> StateBytes:
        model = 4 * parameter_count(self.engine.module)
        return StateBytes(checkpoint=saved_bytes(self.engine) + model, model=model)

    @property
    def _weighting(self) -> Weighting:
        return cast(Weighting, self.config.loss.weighting)

    def _next_batches(self) -> tuple[list[WeightedBatch], float]:
        """Return the batches of a step, and the time spent waiting for them in seconds."""
        batches, seconds = self.batches.take(self.batches_per_step)
        drawn = [
            WeightedBatch(
                batch.packed,
                batch.text,
                batch.lengths,
                total_weight(batch.packed, self._weighting),
            )
            for batch in batches
        ]
        return drawn, seconds

    def _by_ratio(self, batch: PackedSequence, per_sequence: torch.Tensor) -> torch.Tensor:
        """Return (R, 2): per ratio, the weighted sum of its sequences' losses, and their total weight."""
        weights = sequence_weights(batch, self._weighting).double()
        at = torch.stack([batch.ratio == ratio for ratio in self.ratios])
        return at.double() @ torch.stack([per_sequence.double() * weights, weights], dim=1)

    def _metrics(self, sums: torch.Tensor, totals: Mapping[str, float]) -> dict[str, float]:
        """Return means over all ranks and accumulation steps, overall and per ratio."""
        budget = self.config.data.max_tokens * self.batches_per_step * self.ranks.world_size
        return {
            "loss": sums[0].item() / totals["weight"],
            **{name: total for name, total in totals.items() if name != "weight"},
            "fill": totals["tokens"] / budget,
            **means_at_ratios(["loss"], self.ratios, sums[1:].view(-1, 2)),
        }

    def save(self, folder: Path) -> None:
        # Collective parts come first, so that a rank whose own files cannot be written still joins them.
        save_engine(self.engine, folder / "generator")
        self.ema.save(folder / "ema.safetensors")
        if self.ranks.is_main:  # every rank's stream is in the same state
            state = {
                "ema_updates": self.ema.updates,
                "tokenizer": self.latents.fingerprint,
                "began_with": self._initial_settings(),
                "stream": self.batches.state_dict(),
            }
            (folder / "task.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Resume on any number of ranks; see `PackedStream` for the latents that each rank then reads."""
        state = json.loads((folder / "task.json").read_text())
        before = state["tokenizer"]
        if before != self.latents.fingerprint:
            raise UserError(
                f"data.latents: expected latents of tokenizer {before}, as at the start of the run, got "
                f"{self.latents.fingerprint}; use latents of the former, or start a new run in another "
                "output_dir"
            )
        # older checkpoints record less, and had no other betas
        initial = {"loss.beta_schedule": CAT_BETAS, **state.get("began_with", {})}
        require_same_settings(initial, self._initial_settings())
        load_engine(self.engine, folder / "generator", self.ranks, "model")
        self.batches.load_state_dict(state["stream"])
        self._report_new_packing(state["stream"]["packer"]["settings"])
        self.ema.load(folder / "ema.safetensors", state["ema_updates"])

    def _report_new_packing(self, before: Mapping[str, Any]) -> None:
        """Print on rank 0 how budget and window differ from those of the checkpoint."""
        data = self.config.data
        changed = [
            f"data.{name} {before[name]} -> {getattr(data, name)}"
            for name in ("max_tokens", "window")
            if before[name] != getattr(data, name)
        ]
        if changed and self.ranks.is_main:
            print(f"new packing ({', '.join(changed)}): latents not yet used come first", flush=True)

    def _initial_settings(self) -> dict[str, Any]:
        """Return the settings that the weights depend on, which a resumed run cannot change."""
        config, model = self.config, self.engine.module.config
        return {
            "data.normalized": config.data.normalized,
            "data.latents": self.latents.digest,
            "seed": config.seed,
            "loss.prediction": config.loss.prediction,
            "loss.beta_schedule": config.loss.beta_schedule,
            "text_encoder": self.arguments["text_encoder_fingerprint"],
            "loss.noise_shift_tokens": config.loss.noise_shift_tokens,
            "initial_weights": self.initial_weights,
            **model_settings(model, free=("class_dropout_prob", "label_dropout_prob", *self._derived)),
            "model.class_dropout_prob > 0": model.class_dropout_prob > 0,  # there is a null class
        }

    def grid(self, step: int, columns: int | None = None) -> None:
        """Return None: a grid needs a tokenizer, which this task does not have."""

    def evaluate(self) -> None:
        """Return None: an evaluation needs a tokenizer, as a grid does."""

    def close(self) -> None:
        """Stop the thread that reads latents."""
        self.batches.close()

    def export(self, folder: Path) -> None:
        averaged = build_model(DiT, self.arguments) if self.ranks.is_main else None
        self.ema.copy_to(averaged)
        if averaged is not None:
            averaged.save_pretrained(folder)
            self.schedule.save_pretrained(folder / "scheduler")  # with the prediction type and the betas


def _describe_schedule(schedule: Schedule) -> str:
    """Return the prediction target and the betas of a schedule."""
    config = schedule.config
    target, betas = config.get("prediction_type", "flow"), config.get("beta_schedule")
    return f"{target} with {betas} betas" if betas else target


def _lengths(text: PackedText) -> tuple[int, ...]:
    assert text.lengths is not None  # text encoders and their cache know them; reading cu_seqlens would wait
    return text.lengths


def _spending_notice(latents: LatentDataset) -> str | None:
    ratios = Counter(latents.entries.ratios.tolist())
    return spending_notice(latents.origins, ratios, latents.resolution)


def _load_latents(config: GeneratorRun, ranks: Ranks) -> LatentDataset:
    """Load the run's latents; raise a UserError if `data.tokenizer` is set and they are of another one."""
    data = config.data
    fingerprint = scale = None
    if data.tokenizer:
        tokenizer = load_tokenizer(Path(data.tokenizer), "cpu")
        fingerprint, scale = tokenizer.latents_fingerprint(), latent_scale(tokenizer)
    normalized = read_normalization(data.normalized)
    part = ranks.rank, ranks.world_size
    return LatentDataset(data.latents, fingerprint, normalized=normalized, tokenizer_scale=scale, part=part)


def _check_ratios(config: GeneratorRun, latents: LatentDataset, ratios: list[int]) -> None:
    """Check that a model of these ratios can be trained on the latents; raise a UserError otherwise."""
    present = set(latents.entries.ratios.tolist())
    if unknown := present - {*ratios}:
        raise UserError(
            f"data.latents: {config.data.latents} has latents at {min(unknown)}x, but model.ratios is "
            f"{ratios}: add the ratio, or use latents without it"
        )
    if config.data.normalized == "per_ratio" and (missing := {*ratios} - present):
        raise UserError(
            f"data.normalized: per_ratio needs latents at every ratio of model.ratios, there are none at "
            f"{min(missing)}x: set model.ratios={sorted(present)}, or data.normalized=per_channel"
        )


def _check_fit(config: GeneratorRun, latents: LatentDataset, model: DiT, lengths: list[int]) -> None:
    """Check at the start of a run that the latents fit the model and the packer's budget.

    Raises:
        UserError: they do not fit; the message names the key to change.
    """
    data, entries = config.data, latents.entries
    if entries.labels.max() >= model.config.num_classes:
        raise UserError(
            f"model.num_classes is {model.config.num_classes}, but the latents have class "
            f"{entries.labels.max()}: remove the key"
        )
    if max(lengths) > data.max_tokens:
        raise UserError(
            f"data.max_tokens: {data.max_tokens} is less than the longest sequence, {max(lengths)} tokens; "
            "raise it"
        )
    patch = model.config.patch_size
    sides = entries.shapes[:, 1:]
    uneven = (sides % patch).any(axis=1)
    if uneven.any():
        first = entries[int(uneven.argmax())]
        raise UserError(
            f"model.patch_size: {patch} does not divide latents of {first.shape[1]} × {first.shape[2]} at "
            f"{first.ratio}x: use a divisor of {np.gcd.reduce(sides.ravel())}"
        )
    mean = sum(lengths) / len(lengths)
    if data.window * mean < data.max_tokens:
        raise UserError(
            f"data.window: {data.window} latents, with {mean:.0f} tokens on average, do not fill "
            f"data.max_tokens={data.max_tokens}: use at least {math.ceil(1.25 * data.max_tokens / mean)}"
        )


def _warn_of_clipping(latents: LatentDataset) -> None:
    """Warn if the clipping range of samples is within the range of the latents in the model's scale."""
    reach, ratio = max(((reach, ratio) for ratio, reach in latents.reach().items()), default=(0.0, 0))
    if reach > CLIP_RANGE:
        _LOG.warning(
            "data.normalized: latents at %dx reach about ±%.0f in the model's scale, but samples are clipped "
            "at ±%g: use per_channel or per_ratio, or set the tokenizer's scaling_factor",
            *(ratio, reach, CLIP_RANGE),
        )


def _batches_per_step(config: GeneratorRun, ranks: Ranks) -> int:
    """Return the number of batches per rank and step: `accumulation_steps`, or that of the token budget.

    Raises:
        UserError: the token budget of a step is not a multiple of one batch on every rank.
    """
    budget, batch_tokens = config.data.global_tokens, config.data.max_tokens * ranks.world_size
    if not budget:
        return config.accumulation_steps
    batches, rest = divmod(budget, batch_tokens)
    if rest or not batches:
        raise UserError(
            f"data.global_tokens: expected a multiple of {batch_tokens}, which is {ranks.world_size} ranks × "
            f"data.max_tokens={config.data.max_tokens}, got {budget}"
        )
    return batches


def _load_text_encoder(config: GeneratorRun, latents: LatentDataset, ranks: Ranks) -> TextEncoder | None:
    if not config.text_encoder:
        return None
    if not latents.entries.has_captions:
        raise UserError(f"text_encoder: latents in {config.data.latents} have no captions; remove the key")
    encoder = TextEncoder(config.text_encoder, download=False)  # ranks never download
    half = config.precision == "bf16" and ranks.device.type == "cuda"
    return encoder.to(ranks.device, torch.bfloat16) if half else encoder.to(ranks.device)


def _make_caption_encoder(
    encoder: TextEncoder | None, latents: LatentDataset, cache_bytes: int
) -> Callable[[Sequence[str]], PackedText | None]:
    """Return the function that encodes captions, with a cache if those of the dataset fit."""
    if encoder is None:
        return lambda captions: None
    if cache_bytes and estimate_bytes(encoder, *latents.entries.distinct_captions(most=256)) <= cache_bytes:
        return TextCache(encoder, cache_bytes)
    return encoder
