"""Scorer that runs a causal language model with transformers."""

from collections.abc import Sequence
from pathlib import Path

from cat_fast.complexity.description import Description
from cat_fast.complexity.prompt import Prompt
from cat_fast.complexity.score import Score, ScoringFailure
from cat_fast.complexity.scorers.language_model.calibration import ScoreCalibration


class TransformersScorer:
    """Causal language model of transformers that scores by the rubric."""

    def __init__(
        self,
        model: str | Path,
        *,
        prompt: Prompt | None = None,
        scale: int = 9,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int = 16,
        max_new_tokens: int = 48,
        calibration: ScoreCalibration | None = None,
    ) -> None:
        raise NotImplementedError

    name: str
    version: str
    prompt: Prompt

    def score_many(self, descriptions: Sequence[Description]) -> list[Score | ScoringFailure]:
        raise NotImplementedError
