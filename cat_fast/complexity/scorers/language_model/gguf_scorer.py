"""Scorer that runs a GGUF model with llama.cpp, in this process or on its HTTP server."""

from collections.abc import Sequence
from pathlib import Path

from cat_fast.complexity.description import Description
from cat_fast.complexity.prompt import Prompt
from cat_fast.complexity.score import Score, ScoringFailure
from cat_fast.complexity.scorers.language_model.calibration import ScoreCalibration


class GgufScorer:
    """GGUF model run by llama.cpp: a file, or the URL of a llama.cpp server."""

    def __init__(
        self,
        model: str | Path,
        *,
        api_key_env: str = "LLAMA_API_KEY",
        prompt: Prompt | None = None,
        scale: int = 9,
        timeout: float = 60.0,
        concurrency: int = 4,
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
