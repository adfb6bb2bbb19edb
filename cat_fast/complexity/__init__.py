"""Complexity estimation: image description → score → compression ratio and token count.

Independent of the tokenizer: the ratio is chosen before any pixel is encoded.
"""

from cat_fast.complexity.captions import read_descriptions
from cat_fast.complexity.description import Description
from cat_fast.complexity.imagenet_classes import describe_labels, imagenet_description
from cat_fast.complexity.prompt import Prompt
from cat_fast.complexity.ratios.budget import ratios_within_budget
from cat_fast.complexity.ratios.choose import (
    ComplexityResult,
    choose_ratio,
    choose_ratios,
    summarize,
)
from cat_fast.complexity.ratios.jpeg_thresholds import JPEG_THRESHOLDS, JpegThresholds, jpeg_ratio
from cat_fast.complexity.ratios.mix import (
    RATIOS,
    average_latent_side,
    average_ratio,
    mean_tokens,
    ratio_mix,
    tokens_per_image,
)
from cat_fast.complexity.ratios.origin import scored_by
from cat_fast.complexity.ratios.score_counts import ScoreCounts
from cat_fast.complexity.ratios.thresholds import Candidate, RatioThresholds, default_thresholds
from cat_fast.complexity.rubric import rubric_text
from cat_fast.complexity.score import Score, Scorer, ScoringFailure, require_scores, round_score
from cat_fast.complexity.scorers.fast.scorer import FastScorer
from cat_fast.complexity.scorers.loading import bulk_scorer, default_scorer
from cat_fast.complexity.signals.jpeg_size import jpeg_bytes
from cat_fast.data.images.label_fields import SCORES

__all__ = [
    "JPEG_THRESHOLDS",
    "RATIOS",
    "SCORES",
    "Candidate",
    "ComplexityResult",
    "Description",
    "FastScorer",
    "JpegThresholds",
    "Prompt",
    "RatioThresholds",
    "Score",
    "ScoreCounts",
    "Scorer",
    "ScoringFailure",
    "average_latent_side",
    "average_ratio",
    "bulk_scorer",
    "choose_ratio",
    "choose_ratios",
    "default_scorer",
    "default_thresholds",
    "describe_labels",
    "imagenet_description",
    "jpeg_bytes",
    "jpeg_ratio",
    "mean_tokens",
    "ratio_mix",
    "ratios_within_budget",
    "read_descriptions",
    "require_scores",
    "round_score",
    "rubric_text",
    "scored_by",
    "summarize",
    "tokens_per_image",
]
