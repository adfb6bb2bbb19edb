"""Training the diffusion transformer on packed latents of mixed ratios, within a token budget a rank."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from cat_fast.data.latents.dataset import LatentDataset
from cat_fast.errors import UserError
from cat_fast.generator import DiT, PackedText, diffusion_loss, make_schedule
from cat_fast.generator.diffusion import Weighting, sequence_weights, total_weight
from cat_fast.generator.text_cache import TextCache, estimate_bytes
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.models.build import build_model
from cat_fast.models.load import load_tokenizer
from cat_fast.packing import PackedSequence
from cat_fast.training.checkpoints.engine_state import load_engine, save_engine
from cat_fast.training.checkpoints.write_errors import agree_on_writes
from cat_fast.training.config.settings import GeneratorRun
from cat_fast.training.generator.packed_batches import PackedBatches
from cat_fast.training.generator.packed_stream import PackedStream
from cat_fast.training.metrics.flops import GeneratorFlops
from cat_fast.training.metrics.step_means import means_at_ratios
from cat_fast.training.runtime.collective_errors import on_each, raise_together
from cat_fast.training.runtime.ema import EMA
from cat_fast.training.runtime.engine import learning_rate, make_engine, set_learning_rate
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.seeding import seed_step
from cat_fast.training.runtime.step_context import describe_batch
from cat_fast.training.step import Backward


class Drawn(NamedTuple):
    """A batch of a step, and what its loss weighs."""

    packed: PackedSequence
    text: PackedText | None
    lengths: list[int]
    weight: float


class GeneratorTask:
    """Implements `loop.Task` for the DiT."""

    amounts = ("weight", "tokens", "images", "flops", "data_seconds")

    def __init__(self, config: GeneratorRun, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.latents = on_each(lambda: _latents(config), ranks)
        same = ranks.broadcast(self.latents.digest) == self.latents.digest
        other = UserError("data.latents: other latents than rank 0: all ranks must see the same files")
        raise_together(None if same else other, ranks)
        self.text_encoder = _text_encoder(config, self.latents, ranks)
        self._encode = _encoding(self.text_encoder, self.latents, config.text_cache_megabytes << 20)
        self.parts = _batches_a_step(config, ranks)
        torch.manual_seed(config.seed)
        self.arguments = self._model_arguments()
        model = build_model(DiT, self.arguments)
        self.ratios = list(model.config.ratios)
        lengths = self.latents.token_counts(model.config.patch_size)
        _require_fit(config, self.latents, model, lengths)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if config.compile:
            model.compile(dynamic=True)
        self.engine = make_engine(model, config.optimizer, config.deepspeed, self.parts, config.precision)
        agree_on_writes(self.engine, ranks)
        self.flops = GeneratorFlops(self.arguments)
        self.ema = EMA(self.engine.module, config.ema_decay, ranks)
        self.schedule = make_schedule(config.loss.prediction)
        self._drawn: list[Drawn] = []
        self.batches = PackedBatches(
            self.latents,
            PackedStream(lengths, config.data.max_tokens, config.data.window, config.seed, ranks),
            patch_size=model.config.patch_size,
            ahead=self.parts,
            device=ranks.device,
        )

    def _model_arguments(self) -> dict[str, Any]:
        """The `model:` section, completed by what the latents and the text encoder say of themselves."""
        latents = self.latents
        told = {
            "in_channels": latents.entries[0].shape[0],
            "shift_factor": latents.shift_factor,
            "scaling_factor": latents.scaling_factor,
            "tokenizer_fingerprint": latents.fingerprint,
            "text_dim": self.text_encoder.dim if self.text_encoder else None,
            "text_encoder_fingerprint": self.text_encoder.fingerprint() if self.text_encoder else None,
        }
        if both := sorted(told.keys() & self.config.model.keys()):
            raise UserError(
                f"model.{both[0]}: the latents and the text encoder say it; leave it out "
                "(data.normalized=false leaves latents as the tokenizer gives them)"
            )
        return {"num_classes": len(latents.class_names), **told, **self.config.model}

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
            found = diffusion_loss(
                self.engine,
                batch.packed,
                None,
                self.schedule,
                text=batch.text,
                weighting=self._weighting,
                min_snr_gamma=config.loss.min_snr_gamma,
            )
            ranks.step_context.start_waiting()  # from here on ranks wait for each other
            # Batches hold different numbers of tokens and gradients are averaged: weigh each by its share.
            share = batch.weight * ranks.world_size * self.parts / totals["weight"]
            self.engine.backward(found.loss * share)
            by_ratio += self._by_ratio(batch.packed, found.per_sequence)
            losses.append(found.loss.detach())
            if len(losses) < self.parts:
                self.engine.step()  # counts the backward passes, no more
        each = torch.stack(losses)
        weights = torch.tensor([batch.weight for batch in drawn], device=each.device)
        loss = (each.double() * weights).sum()
        return Backward(
            losses={"loss": each},
            engines={"generator": self.engine},
            sums=torch.cat([loss[None], by_ratio.flatten()]),
            metrics=lambda sums: self._metrics(sums, totals),
        )

    def update(self, backward: Backward, sums: torch.Tensor) -> None:
        self.engine.step()
        self.ema.update()

    @property
    def _weighting(self) -> Weighting:
        return cast(Weighting, self.config.loss.weighting)

    def _next_batches(self) -> tuple[list[Drawn], float]:
        """Return the batches of a step, with their texts, and the seconds that this rank waited for them."""
        batches, seconds = self.batches.take(self.parts)
        drawn = [
            Drawn(
                batch.packed,
                self._encode(batch.captions),
                batch.lengths,
                total_weight(batch.packed, self._weighting),
            )
            for batch in batches
        ]
        return drawn, seconds

    def _by_ratio(self, batch: PackedSequence, per_sequence: torch.Tensor) -> torch.Tensor:
        """(R, 2): of each ratio the weighted sum of its sequences' losses, and of their weights."""
        weights = sequence_weights(batch, self._weighting).double()
        at = batch.ratio[None] == torch.tensor(self.ratios, device=batch.ratio.device)[:, None]
        return at.double() @ torch.stack([per_sequence.double() * weights, weights], dim=1)

    def _metrics(self, sums: torch.Tensor, totals: Mapping[str, float]) -> dict[str, float]:
        """Return the means over all ranks and accumulation steps, over everything and at each ratio."""
        budget = self.config.data.max_tokens * self.parts * self.ranks.world_size
        return {
            "loss": sums[0].item() / totals["weight"],
            **{name: total for name, total in totals.items() if name != "weight"},
            "fill": totals["tokens"] / budget,
            **means_at_ratios(["loss"], self.ratios, sums[1:].view(-1, 2)),
        }

    def save(self, folder: Path) -> None:
        # Collective parts first: a rank that cannot write its own files must not be missed in them.
        save_engine(self.engine, folder / "generator")
        self.ema.save(folder / "ema.safetensors")
        if self.ranks.is_main:  # every rank's stream is in the same state
            state = {
                "ema_updates": self.ema.updates,
                "tokenizer": self.latents.fingerprint,
                "began_with": self._began_with(),
                "stream": self.batches.state_dict(),
            }
            (folder / "task.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Any number of ranks goes on; see `PackedStream` for which latents each then reads."""
        state = json.loads((folder / "task.json").read_text())
        before = state["tokenizer"]
        if before != self.latents.fingerprint:
            raise UserError(
                f"data.latents: the run began on latents of tokenizer {before}, these are of "
                f"{self.latents.fingerprint}; give the former, or start a new run in another output_dir"
            )
        began = state.get("began_with", {})  # older checkpoints do not say
        for name, now in self._began_with().items():
            if (then := began.get(name, now)) != now:
                raise UserError(
                    f"{name}: the run began with {then!r}, and this is {now!r}: give the former, or start a "
                    "new run in another output_dir"
                )
        load_engine(self.engine, folder / "generator", self.ranks)
        self.batches.load_state_dict(state["stream"])
        self.ema.load(folder / "ema.safetensors", state["ema_updates"])

    def _began_with(self) -> dict[str, Any]:
        """What the weights were learnt from and for, which a run that goes on cannot change."""
        config = self.config
        return {
            "data.latents": self.latents.digest,
            "seed": config.seed,
            "loss.prediction": config.loss.prediction,
            "text_encoder": self.arguments["text_encoder_fingerprint"],
        }

    def grid(self, step: int) -> None:
        """Nothing: there is no tokenizer here to draw with."""

    def close(self) -> None:
        """Ends the thread that reads latents."""
        self.batches.close()

    def export(self, folder: Path) -> None:
        averaged = build_model(DiT, self.arguments) if self.ranks.is_main else None
        self.ema.copy_to(averaged)
        if averaged is not None:
            averaged.save_pretrained(folder)
            self.schedule.save_pretrained(folder / "scheduler")  # beside it: what its predictions mean


def _lengths(text: PackedText) -> list[int]:
    return text.cu_seqlens.diff().tolist()


def _latents(config: GeneratorRun) -> LatentDataset:
    """Of the run; those of another tokenizer than it names are refused."""
    data = config.data
    named = load_tokenizer(Path(data.tokenizer), "cpu").fingerprint() if data.tokenizer else None
    return LatentDataset(data.latents, named, normalized=data.normalized)


def _require_fit(config: GeneratorRun, latents: LatentDataset, model: DiT, lengths: list[int]) -> None:
    """What the model cannot learn from, or the packer not pack, is better told now than at some step.

    Raises:
        UserError: says what, and which key to change.
    """
    data, entries = config.data, latents.entries
    if unknown := set(entries.ratios.tolist()) - set(model.config.ratios):
        raise UserError(
            f"data.latents: {data.latents} has latents at {min(unknown)}x, and model.ratios is "
            f"{list(model.config.ratios)}: add it, or give latents without"
        )
    if entries.labels.max() >= model.config.num_classes:
        raise UserError(
            f"model.num_classes: {model.config.num_classes}, and the latents have class "
            f"{entries.labels.max()}: leave it out"
        )
    if max(lengths) > data.max_tokens:
        raise UserError(
            f"data.max_tokens: {data.max_tokens} is less than the longest sequence, {max(lengths)} tokens"
        )
    mean = sum(lengths) / len(lengths)
    if data.window * mean < data.max_tokens:
        raise UserError(
            f"data.window: {data.window} latents of {mean:.0f} tokens each, in the mean, do not fill "
            f"data.max_tokens={data.max_tokens}: give at least {math.ceil(1.25 * data.max_tokens / mean)}"
        )


def _batches_a_step(config: GeneratorRun, ranks: Ranks) -> int:
    """Of each rank: `accumulation_steps`, or as many as the step's token budget asks for.

    Raises:
        UserError: the budget of all ranks is no multiple of what they do at a time.
    """
    budget, at_a_time = config.data.global_tokens, config.data.max_tokens * ranks.world_size
    if not budget:
        return config.accumulation_steps
    parts, rest = divmod(budget, at_a_time)
    if rest or not parts:
        raise UserError(
            f"data.global_tokens: {budget} is no multiple of the {at_a_time} tokens that {ranks.world_size} "
            f"ranks take at data.max_tokens={config.data.max_tokens}"
        )
    return parts


def _text_encoder(config: GeneratorRun, latents: LatentDataset, ranks: Ranks) -> TextEncoder | None:
    if not config.text_encoder:
        return None
    if not latents.entries.has_captions:
        raise UserError(f"text_encoder: the latents in {config.data.latents} have no captions; leave it out")
    return TextEncoder(config.text_encoder, download=False).to(ranks.device)  # a rank never downloads


def _encoding(
    encoder: TextEncoder | None, latents: LatentDataset, cache_bytes: int
) -> Callable[[Sequence[str]], PackedText | None]:
    """Return the function that encodes a batch's captions: cached if the states of all captions fit."""
    if encoder is None:
        return lambda captions: None
    if cache_bytes and estimate_bytes(encoder, *latents.entries.distinct_captions(most=256)) <= cache_bytes:
        return TextCache(encoder, cache_bytes)
    return encoder
