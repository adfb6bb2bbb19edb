"""Training of `RatingModel` adapters on rated captions, from hidden states that are computed once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cat_fast.complexity.rated_captions import RatedCaption
from cat_fast.complexity.scorers.accurate.rating_model import UNKNOWN, RatingModel, flag_states
from cat_fast.complexity.sentence_encoder import SentenceEncoder
from cat_fast.data.images.label_fields import SCORES

LEARNING_RATES = {"layers": 1e-3, "head": 1e-3, "flags": 1e-2, "norms": 2e-4}
"""Peak rates of the low-rank updates, of pooling and head, of the flags' effects, and of biases and norms."""


@dataclass(frozen=True)
class TrainingPlan:
    """Settings of the adapters' training."""

    epochs: int = 7
    batch_size: int = 48
    single_rating_rows: int = 2000
    """Number of captions with one rating drawn per epoch; all captions with more are used."""
    single_rating_weight: float = 0.7
    state_weights: tuple[float, float, float] = (0.6, 0.4, 0.1)
    """Weights of the loss with both flags given, none given and one given."""
    rating_width: float = 0.5
    """Standard deviation by which a rating is spread over its neighbours."""
    weight_decay: float = 0.01
    averaged_part: float = 0.3
    """Last part of the training whose weights are averaged."""


@dataclass(frozen=True)
class HiddenCaptions:
    """Hidden states of captions after the frozen layers; padding is not stored."""

    states: Tensor
    """All captions' tokens one after the other, float32 (T, 384)."""
    starts: np.ndarray
    """Index of each caption's first token, and T at the end; int64 (N + 1,)."""

    @classmethod
    def join(cls, states: Sequence[Tensor]) -> "HiddenCaptions":
        """Join the states of each caption, (length, 384)."""
        return cls(torch.cat(list(states)), np.cumsum([0, *map(len, states)]))

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each caption, int64 (N,)."""
        return np.diff(self.starts)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return padded states, (B, L, 384), and False for padding, (B, L)."""
        real = _real(self.lengths[list(indices)].tolist())
        padded = torch.zeros(*real.shape, self.states.shape[1])
        padded[real] = torch.cat([self.states[self.starts[i] : self.starts[i + 1]] for i in indices])
        return padded, real


def train_adapter(
    encoder: SentenceEncoder,
    rated: Sequence[RatedCaption],
    hidden: HiddenCaptions,
    rows: np.ndarray,
    *,
    plan: TrainingPlan,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> RatingModel:
    """Train adapters on the captions `rows` of `rated`; the same arguments give the same weights.

    Args:
        encoder: the frozen encoder.
        rated: all captions.
        hidden: their hidden states, in the same order.
        rows: indices of the captions to train on.
        plan: settings.
        seed: seed of initial weights, order and dropout.
        on_step: is called after every step.
    """
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RatingModel(encoder).train()
        targets = Targets.of(rated, plan)
        batches = _plan_batches(rated, hidden.lengths, rows, plan, rng)
        optimizer = torch.optim.AdamW(_parameter_groups(model, plan), betas=(0.9, 0.98), fused=True)
        peaks = [group["lr"] for group in optimizer.param_groups]
        average: list[Tensor] = []
        trained = [value for value in model.parameters() if value.requires_grad]
        averaged_from = int(len(batches) * (1 - plan.averaged_part))
        for step, batch in enumerate(batches):
            factor = _rate_factor(step, len(batches))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.zero_grad()
            _loss(model, hidden, targets, batch, plan).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if step == averaged_from:
                average = [value.detach().clone() for value in trained]
            elif step > averaged_from:
                torch._foreach_lerp_(average, [value.detach() for value in trained], 0.01)
            on_step()
    with torch.no_grad():
        for value, mean in zip(trained, average, strict=True):
            value.copy_(mean.half().float())  # as stored
    return model.eval()


@torch.no_grad()
def predict_states(
    model: RatingModel, hidden: HiddenCaptions, rows: np.ndarray, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Return the estimates of `RatingModel.predict`, float64 (len(rows), 4, 9) and (len(rows), 2).

    Args:
        model: a trained model.
        hidden: hidden states of all captions.
        rows: indices of the captions to predict.
        batch_size: captions per forward pass.
    """
    ratings, flags = np.zeros((len(rows), 4, len(SCORES))), np.zeros((len(rows), 2))
    order = np.argsort(hidden.lengths[rows], kind="stable")
    for first in range(0, len(rows), batch_size):
        part = order[first : first + batch_size]
        found = model.predict(*hidden.batch(rows[part].tolist()))
        ratings[part], flags[part] = (value.numpy() for value in found)
    return ratings, flags


@dataclass(frozen=True)
class Targets:
    """Training targets of all captions, one row each."""

    ratings: Tensor
    """Target distribution over the ratings 1..9, (N, 9)."""
    means: Tensor
    """Mean ratings, (N,)."""
    flags: Tensor
    """States of the flags (text, faces), int64 (N, 2)."""
    weights: Tensor
    """Weights in the loss, (N,)."""

    @classmethod
    def of(cls, rated: Sequence[RatedCaption], plan: TrainingPlan) -> "Targets":
        """Return the targets of rated captions."""
        scores = np.array(SCORES)
        bells = np.exp(-0.5 * ((scores[:, None] - scores) / plan.rating_width) ** 2)
        bells /= bells.sum(1, keepdims=True)
        ratings = np.array([np.mean([bells[r - 1] for r in row.ratings], axis=0) for row in rated])
        weights = [plan.single_rating_weight if len(row.ratings) == 1 else 1.0 for row in rated]
        return cls(
            torch.from_numpy(ratings).float(),
            torch.tensor([row.mean for row in rated]),
            flag_states([row.description for row in rated]),
            torch.tensor(weights),
        )


def _loss(
    model: RatingModel, hidden: HiddenCaptions, targets: Targets, batch: list[int], plan: TrainingPlan
) -> Tensor:
    features = model.pool(*hidden.batch(batch))
    given = targets.flags[batch]
    one = given.clone()
    one[torch.arange(len(batch)), torch.randint(0, 2, (len(batch),))] = UNKNOWN
    scores = torch.tensor(SCORES, dtype=torch.float32)
    total = torch.zeros(len(batch))
    for flags, weight in zip((given, torch.full_like(given, UNKNOWN), one), plan.state_weights, strict=True):
        logs = model.ratings(features, flags).log_softmax(1)
        cross_entropy = -(targets.ratings[batch] * logs).sum(1)
        expected = (logs.exp() * scores).sum(1)
        error = F.smooth_l1_loss(expected, targets.means[batch], reduction="none", beta=0.3)
        total = total + weight * (cross_entropy + error)
    guess = F.binary_cross_entropy_with_logits(model.flags(features), (given - 1).float(), reduction="none")
    return ((total + 0.1 * guess.sum(1)) * targets.weights[batch]).mean()


def _plan_batches(
    rated: Sequence[RatedCaption],
    lengths: np.ndarray,
    rows: np.ndarray,
    plan: TrainingPlan,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Return the batches of all epochs; a batch holds captions of similar length."""
    single = np.array([len(rated[i].ratings) == 1 for i in rows], dtype=bool)
    batches: list[list[int]] = []
    for _ in range(plan.epochs):
        drawn = rng.permutation(rows[single])[: plan.single_rating_rows]
        epoch = rng.permutation(np.concatenate([rows[~single], drawn]))
        sorted_parts = [
            part[np.argsort(lengths[part], kind="stable")]
            for part in np.split(epoch, range(8 * plan.batch_size, len(epoch), 8 * plan.batch_size))
        ]
        found = [
            part[i : i + plan.batch_size].tolist()
            for part in sorted_parts
            for i in range(0, len(part), plan.batch_size)
        ]
        batches += [found[i] for i in rng.permutation(len(found))]
    return batches


def _parameter_groups(model: RatingModel, plan: TrainingPlan) -> list[dict]:
    names: dict[str, list[Tensor]] = {name: [] for name in LEARNING_RATES}
    for name, value in model.named_parameters():
        if not value.requires_grad:
            continue
        if name.startswith("flag_"):
            names["flags"].append(value)
        elif not name.startswith("layers."):
            names["head"].append(value)
        else:
            names["layers" if name.endswith((".down", ".up")) else "norms"].append(value)
    return [
        {
            "params": values,
            "lr": LEARNING_RATES[name],
            "weight_decay": plan.weight_decay * (name in ("layers", "head")),
        }
        for name, values in names.items()
    ]


def _rate_factor(step: int, steps: int) -> float:
    """Return the factor of the learning rates: linear warm-up, then a cosine to 3 %."""
    warm = min(1.0, (step + 1) / (0.06 * steps))
    return warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _real(lengths: Sequence[int]) -> Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
