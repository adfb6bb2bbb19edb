"""Training the diffusion transformer on packed latents of mixed ratios, within a token budget a rank."""

import json
from pathlib import Path
from typing import cast

import torch

from cat_fast.data.latent_shards import LatentDataset
from cat_fast.errors import UserError
from cat_fast.generator import DiT
from cat_fast.generator.diffusion import Weighting, epsilon_loss, paper_schedule
from cat_fast.inference.checkpoint import load_tokenizer
from cat_fast.packing import PackedSequence, TokenBudgetPacker
from cat_fast.training.distributed import Ranks
from cat_fast.training.ema import EMA
from cat_fast.training.engine import learning_rate, make_engine, set_learning_rate
from cat_fast.training.engine_checkpoint import load_engine, save_engine
from cat_fast.training.flops import GeneratorFlops
from cat_fast.training.guard import SKIPPED, StepGuard
from cat_fast.training.models import build_model
from cat_fast.training.packed_stream import PackedStream
from cat_fast.training.seeding import seed_step
from cat_fast.training.settings import GeneratorRun
from cat_fast.training.write_errors import agree_on_writes


class GeneratorTask:
    """Implements `loop.Task` for the DiT."""

    def __init__(self, config: GeneratorRun, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        tokenizer = config.data.tokenizer
        fingerprint = load_tokenizer(Path(tokenizer), "cpu").fingerprint() if tokenizer else None
        self.latents = LatentDataset(config.data.latents, fingerprint)
        torch.manual_seed(config.seed)
        self.arguments = self._model_arguments()
        model = build_model(DiT, self.arguments)
        self.lengths = self.latents.token_counts(model.config.patch_size)
        if max(self.lengths) > config.data.max_tokens:
            raise UserError(
                f"data.max_tokens: {config.data.max_tokens} is less than the longest sequence, "
                f"{max(self.lengths)} tokens"
            )
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.engine = make_engine(
            model, config.optimizer, config.deepspeed, config.accumulation_steps, config.precision
        )
        agree_on_writes(self.engine, ranks)
        self.flops = GeneratorFlops(self.arguments)
        self.guard = StepGuard(config.guard, ranks)
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
        counts = {
            "weight": sum(weights),
            "tokens": sum(batch.num_tokens for batch in batches),
            "images": sum(len(batch) for batch in batches),
            "flops": sum(self.flops.of(batch.cu_seqlens.diff().tolist()) for batch in batches),
        }
        ranks.work.on([str(key) for batch in batches for key in batch.key or ()])
        seed_step(config.seed, step, ranks.rank)
        set_learning_rate(self.engine, learning_rate(config.optimizer.lr, config.schedule, step))
        losses: list[torch.Tensor] = []
        for batch, share in zip(batches, weights, strict=True):
            weighting = cast(Weighting, config.weighting)
            loss = epsilon_loss(self.engine, batch, None, self.schedule, weighting=weighting).loss
            if not losses:
                ranks.work.computed()  # from here on ranks wait for each other
                sums = torch.tensor(list(counts.values()), dtype=torch.float64, device=ranks.device)
                totals = dict(zip(counts, ranks.sum(sums).tolist(), strict=True))
                weight = totals.pop("weight")
            # Batches hold different numbers of tokens and gradients are averaged: weigh each by its share.
            self.engine.backward(loss * (share * ranks.world_size * len(batches) / weight))
            losses.append(loss.detach())
            if len(losses) < len(batches):
                self.engine.step()  # counts the backward passes, no more
        parts = torch.stack(losses)
        loss_sum = (parts.double() * torch.tensor(weights, device=ranks.device)).sum()
        metrics = {"loss": ranks.sum(loss_sum).item() / weight, **totals}
        if not self.guard.passes({"loss": parts}, {"generator": self.engine}):
            return metrics | {SKIPPED: 1.0}
        self.engine.step()
        self.ema.update()
        return metrics

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
        # Collective parts first: a rank that cannot write its own files must not be missed in them.
        save_engine(self.engine, folder / "generator")
        self.ema.save(folder / "ema.safetensors")
        state = self.stream.state_dict()
        (folder / f"data_rank{self.ranks.rank}.json").write_text(json.dumps(state))
        if self.ranks.is_main:
            about = {"ema_updates": self.ema.updates, "tokenizer": self.latents.fingerprint}
            (folder / "task.json").write_text(json.dumps(about))

    def load(self, folder: Path) -> None:
        """Any number of ranks goes on; see `PackedStream` for which latents each then reads."""
        about = json.loads((folder / "task.json").read_text())
        before = about.get("tokenizer", self.latents.fingerprint)
        if before != self.latents.fingerprint:
            raise UserError(
                f"data.latents: the run began on latents of tokenizer {before}, these are of "
                f"{self.latents.fingerprint}; give the former, or start a new run in another output_dir"
            )
        load_engine(self.engine, folder / "generator", self.ranks)
        saved = len(list(folder.glob("data_rank*.json")))
        self.stream.load_state_dicts(
            [json.loads((folder / f"data_rank{rank}.json").read_text()) for rank in range(saved)]
        )
        self.ema.load(folder / "ema.safetensors", about["ema_updates"])

    def grid(self, step: int) -> None:
        """Nothing: there is no tokenizer here to draw with."""

    def close(self) -> None:
        """Nothing works for it beside this process."""

    def export(self, folder: Path) -> None:
        averaged = build_model(DiT, self.arguments) if self.ranks.is_main else None
        self.ema.copy_to(averaged)
        if averaged is not None:
            averaged.save_pretrained(folder)
