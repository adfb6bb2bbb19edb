"""Caption length as a score, a baseline of the paper's Table 9."""

from collections.abc import Sequence

from cat_fast.complexity.description import Description
from cat_fast.complexity.score import Score, ScoringFailure


class CaptionLength:
    """Number of words or characters of a caption, mapped monotonically to 1..9."""

    def __init__(self, unit: str = "words") -> None:
        raise NotImplementedError

    name: str
    version: str

    def score_many(self, descriptions: Sequence[Description]) -> list[Score | ScoringFailure]:
        raise NotImplementedError
