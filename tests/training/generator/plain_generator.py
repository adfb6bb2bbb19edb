"""Reference training of the cases of `generator_case.py` in plain torch, in one process.

Gradients of the batches are averaged as in ZeRO 2 and 3: divided by the number of ranks, then summed over
ranks and over accumulation steps. `undivided` computes one gradient of all batches, packed as one.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cat_fast.data.latents.dataset import LatentDataset
from cat_fast.generator import DiT
from cat_fast.generator.diffusion import paper_schedule
from cat_fast.packing import PackedSequence
from cat_fast.training.generator.packed_stream import PackedStream
from cat_fast.training.runtime.ema import EMA
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.seeding import seed_step
from tests.training.generator.generator_case import STEPS, WORLD_SIZE, Case


class Part(NamedTuple):
    """A batch and its random numbers."""

    packed: PackedSequence
    timesteps: Tensor
    noise: Tensor
    labels: Tensor


class PlainGenerator:
    """Training of a DiT without engines."""

    def __init__(self, case: Case, folder: Path, latents: Path, *, undivided: bool = False) -> None:
        self.case, self.undivided = case, undivided
        self.config = config = case.run(folder, latents)
        self.latents = LatentDataset(config.data.latents)
        torch.manual_seed(config.seed)
        self.model = DiT(
            in_channels=4,
            num_classes=2,
            shift_factor=self.latents.shift_factor,
            scaling_factor=self.latents.scaling_factor,
            **config.model,
        )
        # `_draw` drops the labels, which is all that the model's training mode would change.
        self.model.eval()
        self.parameters = list(self.model.parameters())
        c = config.optimizer
        self.optimizer = torch.optim.AdamW(self.parameters, c.lr, tuple(c.betas), c.eps, c.weight_decay)
        self.ema = EMA(self.model, config.ema_decay)
        self.schedule = paper_schedule()
        lengths = self.latents.token_counts(2)
        budget, window = config.data.max_tokens, config.data.window
        self.streams = [
            PackedStream(lengths, budget, window, config.seed, Ranks(rank, WORLD_SIZE, rank))
            for rank in range(WORLD_SIZE)
        ]

    def train(self) -> tuple[dict[str, Tensor], list[float]]:
        """Return weights, moments and EMA under the names of `generator_worker.py`, and each step's loss."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as on the ranks
        losses = [self._step(step) for step in range(STEPS)]
        torch.set_num_threads(threads)
        state = {f"ema.{name}": value for name, value in self.ema.averaged.items()}
        for name, parameter in self.model.named_parameters():
            state[f"model.weight.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                if key != "step":
                    state[f"model.{key}.{name}"] = value
        return state, losses

    def _step(self, step: int) -> float:
        ranks = [self._draw(step, rank) for rank in range(WORLD_SIZE)]
        parts = [part for rank in ranks for part in rank]
        if self.undivided:
            packed, *rest = zip(*parts, strict=True)
            parts = [Part(PackedSequence.concat(packed), *(torch.cat(tensors) for tensors in rest))]
        losses = [self._loss(part) for part in parts]
        weights = [
            part.packed.num_tokens if self.case.weighting == "token" else len(part.packed) for part in parts
        ]
        shares = [weight * len(parts) / sum(weights) for weight in weights]
        steps = len(parts) // WORLD_SIZE or 1
        each = [
            torch.autograd.grad(loss * share / steps, self.parameters)
            for loss, share in zip(losses, shares, strict=True)
        ]
        if self.undivided:
            gradients = list(each[0])
        else:
            averaged = [
                [a / WORLD_SIZE + b / WORLD_SIZE for a, b in zip(each[i], each[steps + i], strict=True)]
                for i in range(steps)
            ]
            gradients = averaged[0]
            for more in averaged[1:]:
                gradients = [a + b for a, b in zip(gradients, more, strict=True)]
        self._clip(gradients)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.ema.update()
        return sum(w * loss.item() for w, loss in zip(weights, losses, strict=True)) / sum(weights)

    def _draw(self, step: int, rank: int) -> list[Part]:
        """Return a rank's batches, with random numbers drawn in the order of a training step."""
        batches = [self.streams[rank].next() for _ in range(self.case.accumulation_steps)]
        seed_step(self.config.seed, step, rank)
        parts = []
        for batch in batches:
            samples = [self.latents[i] for i in batch]
            packed = PackedSequence.from_latents([s.latent for s in samples], [s.ratio for s in samples])
            timesteps = torch.randint(1000, (len(packed),))
            noise = torch.randn(packed.tokens.shape)
            dropped = torch.rand(len(packed)) < self.model.config.class_dropout_prob
            labels = torch.tensor([s.label for s in samples]).masked_fill(dropped, 2)
            parts.append(Part(packed, timesteps, noise, labels))
        return parts

    def _loss(self, part: Part) -> Tensor:
        packed = part.packed
        token_timesteps = part.timesteps[packed.sequence_index()]
        noisy = self.schedule.add_noise(packed.tokens, part.noise, token_timesteps)
        predicted = self.model(packed.replace(tokens=noisy), part.timesteps, part.labels).sample
        errors = (predicted - part.noise).square().mean(1)
        if self.case.weighting == "token":
            return errors.mean()
        totals = errors.new_zeros(len(packed)).index_add(0, packed.sequence_index(), errors)
        return (totals / packed.cu_seqlens.diff()).mean()

    def _clip(self, gradients: list[Tensor]) -> None:
        norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
        for gradient in gradients:
            gradient.mul_(1 / ((norm + 1e-6) / self.case.max_grad_norm).clamp(min=1))
