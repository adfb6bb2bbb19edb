"""Ratios of held-out images from their captions, within the tokens of a fixed 16x."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from cat_fast.complexity import Description, default_scorer, require_scores, tokens_per_image
from cat_fast.complexity.ratios.budget import ratios_within_budget
from cat_fast.data.images.index import ImageRecord

RATIOS = (8, 16, 32)


def expected_scores(records: Sequence[ImageRecord]) -> dict[str, float]:
    """Return the expected complexity score of each record, by key."""
    described = [Description(one.caption, one.has_text, one.has_faces) for one in records]
    scores = require_scores(default_scorer(), described)
    return {one.key: score.expected for one, score in zip(records, scores, strict=True)}


def chosen_ratios(scores: dict[str, float]) -> dict[str, int]:
    """Return the ratio of each image by key: as many tokens as possible within those of a fixed 16x."""
    found = ratios_within_budget([*scores.values()], tokens_per_image(16), ratios=RATIOS)
    return dict(zip(scores, found, strict=True))


def describe_budget(ratios: dict[str, int]) -> dict[str, Any]:
    """Return the mix of ratios, and the mean tokens as a multiple of a fixed 16x."""
    counts = Counter(ratios.values())
    tokens = np.mean([tokens_per_image(ratio) for ratio in ratios.values()])
    return {
        "images": len(ratios),
        "mix": {f"{ratio}x": counts[ratio] for ratio in RATIOS},
        "tokens of a fixed 16x": float(tokens) / tokens_per_image(16),
    }
