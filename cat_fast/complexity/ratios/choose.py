"""Choice of compression ratios from descriptions: score each one, then apply the thresholds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cat_fast.complexity.description import Description
from cat_fast.complexity.ratios.mix import (
    average_latent_side,
    average_ratio,
    mean_tokens,
    ratio_mix,
    tokens_per_image,
)
from cat_fast.complexity.ratios.thresholds import RatioThresholds, default_thresholds
from cat_fast.complexity.score import Scorer, require_scores
from cat_fast.complexity.scorers.loading import default_scorer
from cat_fast.integers import store_integers


@dataclass(frozen=True)
class ComplexityResult:
    """A description with its score 1..9 and compression ratio 8, 16 or 32."""

    description: Description
    score: int
    ratio: int
    expected: float
    """Expected score before rounding."""
    confidence: float | None = None
    """See `Score.confidence`."""

    def __post_init__(self) -> None:
        store_integers(self, "score", "ratio")

    def tokens(self, resolution: int = 512, patch_size: int = 2) -> int:
        """Return the image's token count; raise UserError if `resolution` does not divide into patches."""
        return tokens_per_image(self.ratio, resolution, patch_size)


def choose_ratio(
    description: Description, scorer: Scorer | None = None, thresholds: RatioThresholds | None = None
) -> ComplexityResult:
    """Score a description and choose its ratio, by default with the packaged scorer and thresholds."""
    return choose_ratios([description], scorer, thresholds)[0]


def choose_ratios(
    descriptions: Sequence[Description],
    scorer: Scorer | None = None,
    thresholds: RatioThresholds | None = None,
) -> list[ComplexityResult]:
    """Score descriptions and choose their ratios, in order; see `choose_ratio`."""
    thresholds = thresholds or default_thresholds()
    scores = require_scores(scorer or default_scorer(), descriptions)
    return [
        ComplexityResult(
            description,
            score.score,
            thresholds.ratio_of(score),
            expected=score.expected,
            confidence=score.confidence,
        )
        for description, score in zip(descriptions, scores, strict=True)
    ]


def summarize(
    results: Sequence[ComplexityResult], resolution: int = 512, patch_size: int = 2
) -> dict[str, Any]:
    """Return all results, their mix of ratios and its cost against a fixed 16x tokenizer, as JSON values.

    Raises:
        UserError: `results` is empty.
    """
    mix = ratio_mix(result.ratio for result in results)
    return summarize_mix(mix, resolution, patch_size) | {
        "images": [
            asdict(result.description)
            | {
                "score": result.score,
                "expected": result.expected,
                "confidence": result.confidence,
                "ratio": result.ratio,
                "tokens": result.tokens(resolution, patch_size),
            }
            for result in results
        ],
    }


def summarize_mix(mix: Mapping[int, float], resolution: int = 512, patch_size: int = 2) -> dict[str, Any]:
    """Return a mix of ratios, {ratio: share}, and its cost against a fixed 16x tokenizer, as JSON values."""
    return {
        "resolution": resolution,
        "patch_size": patch_size,
        "mix": {str(ratio): share for ratio, share in mix.items()},
        "mean_tokens": mean_tokens(mix, resolution, patch_size),
        "fixed_16x_tokens": tokens_per_image(16, resolution, patch_size),
        "average_ratio": average_ratio(mix),
        "average_latent_side": average_latent_side(mix, resolution),
    }
