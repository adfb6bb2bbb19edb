"""Reference training of the cases of `gan_case.py` in plain torch, in one process.

By default it computes one gradient per batch and averages them in DeepSpeed's order. Each gradient is divided
by the number of ranks before it is summed over ranks. Under ZeRO 1, ranks first sum their accumulation steps;
under ZeRO 2 each is averaged over ranks, then summed. `undivided` computes one gradient of the mean loss over
all images, with one batch per ratio.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cat_fast.tokenizer.losses import DiscriminatorObjective, TokenizerObjective
from cat_fast.training.runtime.ema import EMA
from cat_fast.training.runtime.seeding import seed_step
from tests.training.tokenizer.gan_case import SIDE, STEPS, WORLD_SIZE, Case, ratio_of, tiny_models


class Part(NamedTuple):
    """A batch at one ratio and its random numbers."""

    ratio: int
    images: Tensor
    noise: Tensor
    """Noise of the posterior, (B, c, h, w)."""
    windows: Tensor
    """Top left corners of the discriminator's crops, (B, 2, 2): in the autoencoder's step and in its own."""


class PlainGAN:
    """Training without engines; with `skip_idle`, AdamW skips parameters that a step does not use."""

    def __init__(self, case: Case, folder: Path, *, undivided: bool = False, skip_idle: bool = False) -> None:
        self.case, self.undivided, self.skip_idle = case, undivided, skip_idle
        self.config = case.run(folder)
        self.model, self.discriminator = tiny_models()
        self.optimizers = {}
        for module, c in (
            (self.model, self.config.optimizer),
            (self.discriminator, self.config.discriminator.optimizer),
        ):
            self.optimizers[module] = torch.optim.AdamW(
                module.parameters(), c.lr, tuple(c.betas), c.eps, c.weight_decay
            )
        self.objective = TokenizerObjective(self.config.loss)
        self.discriminator_objective = DiscriminatorObjective(self.config.loss)
        self.ema = EMA(self.model, self.config.ema_decay)

    def train(self) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        """Return weights, moments and EMA under the names of `gan_worker.py`, and each step's mean losses."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as on the ranks
        metrics = [self._step(step) for step in range(STEPS)]
        torch.set_num_threads(threads)
        state = {f"ema.{name}": value for name, value in self.ema.averaged.items()}
        for prefix, module in (("model", self.model), ("discriminator", self.discriminator)):
            for name, parameter in module.named_parameters():
                state[f"{prefix}.weight.{name}"] = parameter.detach()
                for moment, value in self.optimizers[module].state[parameter].items():
                    if moment != "step":
                        state[f"{prefix}.{moment}.{name}"] = value
        return state, metrics

    def _step(self, step: int) -> dict[str, float]:
        parts = [part for rank in range(WORLD_SIZE) for part in self._draw(step, rank)]
        if self.undivided:
            parts = [_joined([p for p in parts if p.ratio == f]) for f in sorted({p.ratio for p in parts})]
        gan = self.objective.gan.active(step)
        outputs, losses, terms = [], [], []
        for part in parts:
            posterior = self.model.encode(part.images, part.ratio).latent_dist
            z = posterior.mean + posterior.std * part.noise
            output = self.model.decode(z, part.ratio).sample
            logits = self.discriminator(self._crop(output, part.windows[:, 0])) if gan else None
            loss = self.objective(part.images, output, posterior, logits)
            outputs.append(output.detach())
            losses.append(loss.total)
            terms.append({"loss": loss.total, **loss.terms()})
        self._move(self.model, losses, parts)
        if gan:
            losses = []
            for part, output, values in zip(parts, outputs, terms, strict=True):
                crops = [self._crop(x, part.windows[:, 1]) for x in (part.images, output)]
                real, fake = self.discriminator(torch.cat(crops)).chunk(2)
                loss = self.discriminator_objective(step, real, fake, self.discriminator, crops[0])
                losses.append(loss.total)
                values |= {**loss.terms(), "real_logit": real.mean(), "fake_logit": fake.mean()}
                values["discriminator_accuracy"] = torch.cat([real > 0, fake < 0]).float().mean()
            self._move(self.discriminator, losses, parts)
        self.ema.update()
        metrics = {name: _mean(parts, [values[name] for values in terms]) for name in terms[0]}
        if gan:
            self.discriminator_objective.lecam.update(metrics["real_logit"], metrics["fake_logit"])
        for f in {part.ratio for part in parts}:
            some = [i for i, part in enumerate(parts) if part.ratio == f]
            for name in terms[0]:
                metrics[f"{name}_{f}x"] = _mean([parts[i] for i in some], [terms[i][name] for i in some])
        return metrics

    def _draw(self, step: int, rank: int) -> list[Part]:
        """Return a rank's batches, with random numbers drawn in the order of a training step."""
        seed_step(self.config.seed, step, rank)
        parts = []
        for number in range(self.case.accumulation_steps):
            ratio, images = ratio_of(step, rank, number), self.case.images(step, rank, number)
            noise = torch.randn(len(images), 4, SIDE // ratio, SIDE // ratio)
            windows = torch.zeros(len(images), 2, 2, dtype=torch.int64)
            if self.objective.gan.active(step):
                corners = SIDE - self.discriminator.resolution + 1
                for which, side in ((0, 0), (0, 1), (1, 0), (1, 1)):
                    windows[:, which, side] = torch.randint(0, corners, (len(images),))
            parts.append(Part(ratio, images, noise, windows))
        return parts

    def _crop(self, images: Tensor, corners: Tensor) -> Tensor:
        side = self.discriminator.resolution
        pairs = zip(images, corners.tolist(), strict=True)
        return torch.stack([x[:, i : i + side, j : j + side] for x, (i, j) in pairs])

    def _move(self, module: nn.Module, losses: Sequence[Tensor], parts: Sequence[Part]) -> None:
        """Update a model with the gradient of the mean of `losses` over the images of `parts`."""
        parameters = list(module.parameters())

        def gradient(loss: Tensor) -> list[Tensor | None]:
            return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))

        if self.undivided:
            weighted = [s * loss for s, loss in zip(_shares(parts), losses, strict=True)]
            mean = gradient(torch.stack(weighted).sum())
        else:
            steps = self.case.accumulation_steps
            shares = _shares(parts, len(parts))
            each = [gradient(loss * s / steps) for s, loss in zip(shares, losses, strict=True)]
            ranks = [each[:steps], each[steps:]]
            if self.case.stage == 1:
                mean = _sum([_over_world(_sum(rank)) for rank in ranks])
            else:
                mean = _sum([_sum([_over_world(g) for g in part]) for part in zip(*ranks, strict=True)])
        if not self.skip_idle:
            mean = [torch.zeros_like(p) if g is None else g for g, p in zip(mean, parameters, strict=True)]
        self._clip([g for g in mean if g is not None])
        for parameter, value in zip(parameters, mean, strict=True):
            parameter.grad = value
        self.optimizers[module].step()

    def _clip(self, gradients: list[Tensor]) -> None:
        """Clip the norm as DeepSpeed does, by the square root of the sum of squares in float64."""
        square = torch.cat([g.flatten() for g in gradients]).double().square().sum()
        scale = (square.sqrt().float() + 1e-6) / self.case.max_grad_norm
        for gradient in gradients:
            gradient.mul_(1 / scale.clamp(min=1))


def _shares(parts: Sequence[Part], total: int = 1) -> list[float]:
    """Return each batch's fraction of the images, scaled to sum to `total`."""
    return [len(part.images) * total / sum(len(p.images) for p in parts) for part in parts]


def _mean(parts: Sequence[Part], values: Sequence[Tensor]) -> float:
    """Return the mean of the batches' values, weighted by their numbers of images."""
    return sum(share * value.item() for share, value in zip(_shares(parts), values, strict=True))


def _joined(parts: list[Part]) -> Part:
    """Concatenate batches of one ratio."""
    return Part(parts[0].ratio, *(torch.cat([part[i] for part in parts]) for i in (1, 2, 3)))


def _sum(gradients: Sequence[list[Tensor | None]]) -> list[Tensor | None]:
    """Sum gradients in the given order; a sum is None if all its terms are."""
    total = [None if g is None else g.clone() for g in gradients[0]]
    for others in gradients[1:]:
        for i, other in enumerate(others):
            if other is not None:
                total[i] = other.clone() if total[i] is None else total[i].add_(other)
    return total


def _over_world(gradient: list[Tensor | None]) -> list[Tensor | None]:
    return [None if g is None else g / WORLD_SIZE for g in gradient]
