"""Origin of scores, to be stored with them."""

from cat_fast.complexity.ratios.thresholds import RatioThresholds
from cat_fast.complexity.score import Scorer
from cat_fast.data.ratio_origin import ScoredBy


def scored_by(scorer: Scorer, thresholds: RatioThresholds) -> ScoredBy:
    """Return the scorer of scores, with the thresholds that choose their ratios."""
    return ScoredBy(scorer.name, scorer.version, thresholds.pair)
