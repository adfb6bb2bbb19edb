"""Monotone calibration of a language model's expected scores to human-like ratings, one file per model."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ScoreCalibration:
    """Monotone map from expected scores to mean ratings."""

    @classmethod
    def load(cls, path: Path) -> "ScoreCalibration":
        raise NotImplementedError

    def save(self, path: Path) -> None:
        raise NotImplementedError
