"""Comparison of generators at an equal budget of tokens: recognised samples, FID and KID."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.nano.emoji_classifier import Trained
from benchmarks.nano.intervals import mean_with_interval, paired_difference
from benchmarks.nano.samples import Sampling, draw, recognised
from cat_fast.evaluation.distances.kernel import kernel_distance
from cat_fast.evaluation.proxy import fid_of_features, proxy_features
from cat_fast.inference import CATPipeline

IMAGES = 520
"""Samples of a generator: more than the 512 features of the trunk."""
_BATCH = 8


def judge(
    pipeline: CATPipeline,
    classifier: Trained,
    captions: Sequence[str],
    sampling: Sampling,
    mean_tokens: float,
    reference: Tensor,
) -> dict[str, Any]:
    """Draw one sample per caption within a budget; return recognised samples, FID and KID.

    Args:
        captions: of training images, those of the classifier's classes first.
        reference: features of the training images.
    """
    drawn = draw(
        pipeline, captions, mean_tokens=mean_tokens, steps=sampling.steps, guidance=sampling.guidance
    )
    classes = len(classifier.captions)
    found = recognised(drawn, classifier, classes)
    features = features_of(drawn.images)
    kid = kernel_distance(features, reference)
    return {
        "images": len(captions),
        "recognised": found | {"share": mean_with_interval([float(hit) for hit in found["found"].values()])},
        "proxy-FID-vgg16": fid_of_features(features, reference),
        "proxy-KID-vgg16": {"mean": kid.value, "low": kid.low, "high": kid.high},
        "mean_tokens": sum(drawn.tokens) / len(drawn.tokens),
    }


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return the paired difference in recognised samples of two results of `judge` for the same captions."""
    first, second = (one["recognised"]["found"] for one in (ours, theirs))
    return paired_difference([float(first[key]) for key in first], [float(second[key]) for key in first])


def features_of(images: Tensor) -> Tensor:
    """Return the trunk's features (N, 512) of images (N, 3, H, W) in [-1, 1]."""
    return proxy_features(images.split(_BATCH))


def weights_digest(model: torch.nn.Module) -> str:
    """Return 16 hex digits that identify the weights of a model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
