"""The GAN's losses, all in float32: in bf16 several projects saw theirs turn NaN after 30,000 steps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PairLoss = Callable[[Tensor, Tensor], Tensor]


def non_saturating_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Standard: -log sigmoid(D(real)) - log(1 - sigmoid(D(fake)))."""
    return F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean()


def non_saturating_generator(fake_logits: Tensor) -> Tensor:
    """-log sigmoid(D(fake)) (Goodfellow et al., 2014)."""
    return F.softplus(-fake_logits.float()).mean()


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """max(0, 1 - D(real)) + max(0, 1 + D(fake)) (Lim and Ye, 2017)."""
    return F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean()


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """-D(fake)."""
    return -fake_logits.float().mean()


GAN_LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], PairLoss]] = {
    "non_saturating": (non_saturating_generator, non_saturating_discriminator),
    "hinge": (hinge_generator, hinge_discriminator),
}
"""By name: the generator's loss and the discriminator's."""


@dataclass
class R1:
    """E |grad D(real)|^2 / 2 (Mescheder et al., 2018), in every so many steps and as many times as heavy.

    Being lazy costs little: Karras et al. (2020) compute it in every 16th step.
    """

    weight: float
    every_steps: int
    name: str = "r1"

    def due(self, step: int) -> bool:
        return self.weight > 0 and step % self.every_steps == 0

    @property
    def lazy_weight(self) -> float:
        """That of a step in which it is computed."""
        return self.weight * self.every_steps

    def __call__(self, judge: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
        """Of a discriminator `judge`, (B, 3, H, W) -> (B,), at the images `real`."""
        real = real.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(judge(real).float().sum(), real, create_graph=True)
        return 0.5 * gradient.float().square().sum((1, 2, 3)).mean()


class LeCam:
    """Keeps logits near the other side's running mean: E (D(real) - a_fake)^2 + E (D(fake) - a_real)^2.

    Tseng et al., "Regularizing Generative Adversarial Networks under Limited Data" (2021). The means are part
    of a checkpoint.
    """

    name = "lecam"

    def __init__(self, weight: float, decay: float = 0.99) -> None:
        self.weight, self.decay = weight, decay
        self.real, self.fake = 0.0, 0.0

    def __call__(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Of this batch against the means of the batches before."""
        real, fake = real_logits.float(), fake_logits.float()
        return (real - self.fake).square().mean() + (fake - self.real).square().mean()

    def update(self, real: float, fake: float) -> None:
        """Take in the mean logits of a batch, over all ranks."""
        self.real = self.decay * self.real + (1 - self.decay) * real
        self.fake = self.decay * self.fake + (1 - self.decay) * fake

    def state_dict(self) -> dict[str, float]:
        return {"real": self.real, "fake": self.fake}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.real, self.fake = state["real"], state["fake"]


def balance(reconstruction: Tensor, adversarial: Tensor, output: Tensor) -> Tensor:
    """How much to weigh the adversarial loss so that both pull equally hard at `output`, the images.

    The ratio of the two gradients' norms, at most 1e4. VQGAN (Esser et al., 2021) takes them at the decoder's
    last layer; gradients of single parameters are not to be had under ZeRO, those of the output are.
    """
    norms = [
        torch.autograd.grad(loss, output, retain_graph=True)[0].float().norm()
        for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()
