"""Scorer that asks a language model over an OpenAI-compatible chat endpoint."""

from collections.abc import Sequence

from cat_fast.complexity.description import Description
from cat_fast.complexity.prompt import Prompt
from cat_fast.complexity.score import Score, ScoringFailure
from cat_fast.complexity.scorers.language_model.calibration import ScoreCalibration


class EndpointScorer:
    """Language model behind an OpenAI-compatible chat endpoint."""

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        prompt: Prompt | None = None,
        scale: int = 9,
        timeout: float = 60.0,
        concurrency: int = 16,
        retries: int = 4,
        max_new_tokens: int = 48,
        calibration: ScoreCalibration | None = None,
    ) -> None:
        raise NotImplementedError

    name: str
    version: str
    prompt: Prompt

    def score_many(self, descriptions: Sequence[Description]) -> list[Score | ScoringFailure]:
        raise NotImplementedError
