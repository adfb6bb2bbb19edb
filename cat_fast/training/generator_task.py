"""Training the diffusion transformer on packed latents of mixed ratios, within a token budget a rank."""

import json
from pathlib import Path
from typing import cast

import torch

from cat_fast.data.latent_shards import LatentDataset
from cat_fast.errors import UserError
from cat_fast.generator import DiT
from cat_fast.generator.diffusion import Weighting, epsilon_loss, paper_schedule
from cat_fast.packing import PackedSequence, TokenBudgetPacker
from cat_fast.training.distributed import Ranks
from cat_fast.training.ema import EMA
from cat_fast.training.engine import learning_rate, make_engine, set_learning_rate
from cat_fast.training.engine_checkpoint import load_engine, save_engine
from cat_fast.training.models import build_model
from cat_fast.training.packed_stream import PackedStream
from cat_fast.training.seeding import seed_step
from cat_fast.training.settings import GeneratorRun


class GeneratorTask:
    """Implements `loop.Task` for the DiT."""

    def __init__(self, config: GeneratorRun, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.latents = LatentDataset(config.data.latents)
        torch.manual_seed(config.seed)
        self.arguments = self._model_arguments()
        model = build_model(DiT, self.arguments)
        self.lengths = self.latents.token_counts(model.config.patch_size)
        if max(self.lengths) > config.data.max_tokens:
            raise UserError(
                f"data.max_tokens: {config.data.max_tokens} is less than the longest sequence, "
                f"{max(self.lengths)} tokens"
            )
        self.engine = make_engine(
            model, config.optimizer, config.deepspeed, config.accumulation_steps, config.precision
        )
        self.ema = EMA(self.engine.module, config.ema_decay, ranks)
        self.schedule = paper_schedule()
        packer: TokenBudgetPacker[int] = TokenBudgetPacker(config.data.max_tokens, window=config.data.window)
        self.stream = PackedStream(self.lengths, packer, config.seed, ranks)

    def _model_arguments(self) -> dict:
        """The `model:` section, completed by what the latents say of themselves."""
        latents = self.latents
        return {
            "in_channels": latents.entries[0].shape[0],
            "num_classes": len(latents.class_names),
            "shift_factor": latents.shift_factor,
            "scaling_factor": latents.scaling_factor,
            "tokenizer_fingerprint": latents.fingerprint,
            **self.config.model,
        }

    def train_step(self, step: int) -> dict[str, float]:
        config, ranks = self.config, self.ranks
        batches = [self._next_batch() for _ in range(config.accumulation_steps)]
        weights = [batch.num_tokens if config.weighting == "token" else len(batch) for batch in batches]
        counts = [sum(weights), sum(b.num_tokens for b in batches), sum(len(b) for b in batches)]
        totals = torch.tensor(counts, dtype=torch.float64, device=ranks.device)
        weight, tokens, images = ranks.sum(totals).tolist()
        seed_step(config.seed, step, ranks.rank)
        set_learning_rate(self.engine, learning_rate(config.optimizer.lr, config.schedule, step))
        loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for batch, share in zip(batches, weights, strict=True):
            weighting = cast(Weighting, config.weighting)
            loss = epsilon_loss(self.engine, batch, None, self.schedule, weighting=weighting).loss
            loss_sum += loss.detach().double() * share
            # Batches hold different numbers of tokens and gradients are averaged: weigh each by its share.
            self.engine.backward(loss * (share * ranks.world_size * len(batches) / weight))
            self.engine.step()
        self.ema.update()
        return {"loss": ranks.sum(loss_sum).item() / weight, "tokens": tokens, "images": images}

    def _next_batch(self) -> PackedSequence:
        samples = [self.latents[i] for i in self.stream.next()]
        packed = PackedSequence.from_latents(
            [sample.latent for sample in samples],
            [sample.ratio for sample in samples],
            self.engine.module.config.patch_size,
            labels=[sample.label for sample in samples],
            keys=[sample.key for sample in samples],
        )
        return packed.to(self.ranks.device)

    def save(self, folder: Path) -> None:
        save_engine(self.engine, folder / "generator")
        state = self.stream.state_dict()
        (folder / f"data_rank{self.ranks.rank}.json").write_text(json.dumps(state))
        self.ema.save(folder / "ema.safetensors")
        if self.ranks.is_main:
            (folder / "task.json").write_text(json.dumps({"ema_updates": self.ema.updates}))

    def load(self, folder: Path) -> None:
        """Any number of ranks goes on; see `PackedStream` for which latents each then reads."""
        load_engine(self.engine, folder / "generator", self.ranks)
        saved = len(list(folder.glob("data_rank*.json")))
        self.stream.load_state_dicts(
            [json.loads((folder / f"data_rank{rank}.json").read_text()) for rank in range(saved)]
        )
        updates = json.loads((folder / "task.json").read_text())["ema_updates"]
        self.ema.load(folder / "ema.safetensors", updates)

    def export(self, folder: Path) -> None:
        averaged = build_model(DiT, self.arguments) if self.ranks.is_main else None
        self.ema.copy_to(averaged)
        if averaged is not None:
            averaged.save_pretrained(folder)
