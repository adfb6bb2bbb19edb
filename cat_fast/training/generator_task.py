"""Training the diffusion transformer on packed latents of mixed ratios, within a token budget a rank."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, cast

import numpy as np
import torch

from cat_fast.data.latent_shards import LatentDataset
from cat_fast.errors import UserError
from cat_fast.generator import DiT
from cat_fast.generator.diffusion import Weighting, epsilon_loss, paper_schedule
from cat_fast.packing import PackedSequence, TokenBudgetPacker
from cat_fast.training.distributed import Ranks
from cat_fast.training.ema import EMA
from cat_fast.training.engine import learning_rate, make_engine, set_learning_rate
from cat_fast.training.flops import GeneratorFlops
from cat_fast.training.models import build_model
from cat_fast.training.seeding import seed_step
from cat_fast.training.settings import GeneratorRun


class LatentStream:
    """One rank's endless stream of latents: each epoch is a new permutation, dealt to the ranks in turn."""

    def __init__(self, size: int, seed: int, ranks: Ranks) -> None:
        self.size, self.seed, self.ranks = size, seed, ranks
        self.position = ranks.rank

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        epoch, place = divmod(self.position, self.size)
        self.position += self.ranks.world_size
        return int(np.random.default_rng([self.seed, epoch]).permutation(self.size)[place])


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
        self.engine = make_engine(model, config.optimizer, config.deepspeed)
        self.flops = GeneratorFlops(self.arguments)
        self.ema = EMA(self.engine.module, config.ema_decay) if ranks.is_main else None
        self.schedule = paper_schedule()
        self.stream = LatentStream(len(self.latents), config.seed, ranks)
        self.packer: TokenBudgetPacker[int] = TokenBudgetPacker(
            config.data.max_tokens, window=config.data.window
        )

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
        config = self.config
        packed = self._next_batch()
        flops = self.flops.of(packed.cu_seqlens.diff().tolist())  # here, where a GPU need not stop for it
        packed = packed.to(self.ranks.device)
        seed_step(config.seed, step, self.ranks.rank)
        set_learning_rate(self.engine, learning_rate(config.optimizer.lr, config.schedule, step))
        weighting = cast(Weighting, config.weighting)
        result = epsilon_loss(self.engine, packed, None, self.schedule, weighting=weighting)
        # Ranks hold different numbers of tokens and gradients are averaged: weigh each by its share.
        totals = torch.tensor(
            [result.loss.item() * result.weight, result.weight, packed.num_tokens, len(packed), flops],
            dtype=torch.float64,
            device=self.ranks.device,
        )
        loss_sum, weight, tokens, images, flops = self.ranks.sum(totals).tolist()
        self.engine.backward(result.loss * (result.weight * self.ranks.world_size / weight))
        self.engine.step()
        if self.ema:
            self.ema.update()
        return {"loss": loss_sum / weight, "tokens": tokens, "images": images, "flops": flops}

    def _next_batch(self) -> PackedSequence:
        while (batch := self.packer.next()) is None:
            index = next(self.stream)
            self.packer.add(index, self.lengths[index])
        samples = [self.latents[i] for i in batch]
        return PackedSequence.from_latents(
            [sample.latent for sample in samples],
            [sample.ratio for sample in samples],
            self.engine.module.config.patch_size,
            labels=[sample.label for sample in samples],
            keys=[sample.key for sample in samples],
        )

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder / "generator"), tag="state")
        state = {"stream": self.stream.position, "packer": self.packer.state_dict()}
        (folder / f"data_rank{self.ranks.rank}.json").write_text(json.dumps(state))
        if self.ema:
            self.ema.save(folder / "ema.safetensors")
            (folder / "task.json").write_text(json.dumps({"ema_updates": self.ema.updates}))

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder / "generator"), tag="state")
        state = json.loads((folder / f"data_rank{self.ranks.rank}.json").read_text())
        self.stream.position = state["stream"]
        self.packer.load_state_dict(state["packer"])
        if self.ema:
            updates = json.loads((folder / "task.json").read_text())["ema_updates"]
            self.ema.load(folder / "ema.safetensors", updates)

    def grid(self, step: int) -> NoReturn:
        raise NotImplementedError("no tokenizer to draw with: GeneratorRun refuses grids")

    def export(self, folder: Path) -> None:
        if self.ema:
            averaged = build_model(DiT, self.arguments)
            self.ema.copy_to(averaged)
            averaged.save_pretrained(folder)
