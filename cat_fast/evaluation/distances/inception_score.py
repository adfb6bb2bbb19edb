"""Inception Score (Salimans et al., 2016): exp of the mean KL(p(y|x) || p(y)), over splits of the images."""

from typing import NamedTuple

import torch
from torch import Tensor

from cat_fast.errors import UserError

SPLITS = 10


class InceptionScore(NamedTuple):
    """Mean over the splits, and standard deviation (divisor N)."""

    mean: float
    std: float


def inception_score(logits: Tensor, splits: int = SPLITS) -> InceptionScore:
    """Return the score of images by their classifier's logits, (N, classes), in the order of the images.

    The published figures leave the bias out of the logits, as the FID network's `logits` do. ADM's evaluator
    has splits of 5,000 images, which equals 10 splits of 50,000; torch-fidelity shuffles the images before.

    Raises:
        UserError: fewer images than splits.
    """
    if len(logits) < splits:
        raise UserError(
            f"Inception Score: expected at least {splits} images, one per split, got {len(logits)}"
        )
    scores = []
    for part in range(splits):
        rows = logits[part * len(logits) // splits : (part + 1) * len(logits) // splits].double()
        log_p = rows.log_softmax(1)
        p = log_p.exp()
        # sum p log p - sum p log q, with log q finite where a class underflows in every image
        log_q = log_p.logsumexp(0) - torch.tensor(float(len(rows)), dtype=torch.float64).log()
        scores.append((p * (log_p - log_q)).sum(1).mean().exp())
    found = torch.stack(scores)
    return InceptionScore(found.mean().item(), found.std(correction=0).item())
