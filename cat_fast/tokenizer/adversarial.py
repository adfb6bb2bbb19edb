"""GAN losses and regularisers, all in float32: in bf16, several projects got NaN after 30,000 steps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PairLoss = Callable[[Tensor, Tensor], Tensor]


def non_saturating_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the standard loss -log sigmoid(D(real)) - log(1 - sigmoid(D(fake)))."""
    return F.softplus(-real_logits.float()).mean() + F.softplus(fake_logits.float()).mean()


def non_saturating_autoencoder(fake_logits: Tensor) -> Tensor:
    """Return -log sigmoid(D(fake)) (Goodfellow et al., 2014)."""
    return F.softplus(-fake_logits.float()).mean()


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return max(0, 1 - D(real)) + max(0, 1 + D(fake)) (Lim and Ye, 2017)."""
    return F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean()


def hinge_autoencoder(fake_logits: Tensor) -> Tensor:
    """Return -D(fake)."""
    return -fake_logits.float().mean()


GAN_LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], PairLoss]] = {
    "non_saturating": (non_saturating_autoencoder, non_saturating_discriminator),
    "hinge": (hinge_autoencoder, hinge_discriminator),
}
"""Loss of the autoencoder and loss of the discriminator, by name."""


@dataclass
class R1:
    """Lazy R1 penalty, E |grad D(real)|^2 / 2 (Mescheder et al., 2018).

    Computed in every `every_steps`-th step, with `every_steps` times the weight. Karras et al. (2020) use 16.
    """

    weight: float
    every_steps: int
    name: str = "r1"

    def due(self, step: int) -> bool:
        return self.weight > 0 and step % self.every_steps == 0

    @property
    def lazy_weight(self) -> float:
        """Weight in a step that computes the penalty."""
        return self.weight * self.every_steps

    def __call__(self, discriminator: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
        """Return the penalty of a discriminator, (B, 3, H, W) -> (B,), at the images `real`."""
        real = real.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(real).float().sum(), real, create_graph=True)
        return 0.5 * gradient.float().square().sum((1, 2, 3)).mean()


class LeCam:
    """LeCam regulariser, E (D(real) - a_fake)^2 + E (D(fake) - a_real)^2, with running means a of the logits.

    Tseng et al., "Regularizing Generative Adversarial Networks under Limited Data" (2021). The means are
    saved in checkpoints.
    """

    name = "lecam"

    def __init__(self, weight: float, decay: float = 0.99) -> None:
        self.weight, self.decay = weight, decay
        self.real, self.fake = 0.0, 0.0

    def __call__(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return the penalty of a batch, using the means of previous batches."""
        real, fake = real_logits.float(), fake_logits.float()
        return (real - self.fake).square().mean() + (fake - self.real).square().mean()

    def update(self, real: float, fake: float) -> None:
        """Update the running means with the mean logits of a batch over all ranks."""
        self.real = self.decay * self.real + (1 - self.decay) * real
        self.fake = self.decay * self.fake + (1 - self.decay) * fake

    def state_dict(self) -> dict[str, float]:
        return {"real": self.real, "fake": self.fake}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.real, self.fake = state["real"], state["fake"]


def balance(reconstruction: Tensor, adversarial: Tensor, output: Tensor) -> Tensor:
    """Return the adversarial weight for which both losses have equal gradient norms at `output`, the images.

    It is the ratio of the two gradient norms, at most 1e4. VQGAN (Esser et al., 2021) takes them at the
    decoder's last layer. ZeRO gives no access to gradients of single parameters, so the output is used.
    """
    norms = [
        torch.autograd.grad(loss, output, retain_graph=True)[0].float().norm()
        for loss in (reconstruction, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()
