"""The scorer of captions where no other is chosen."""

from functools import cache

from cat_fast.complexity.fast.scorer import FastScorer
from cat_fast.complexity.score import Scorer


@cache
def default_scorer() -> Scorer:
    """Return the packaged scorer, loaded once."""
    return FastScorer.load()
