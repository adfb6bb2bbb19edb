"""Versions of language-model scorers, which differ if the scores may."""

import hashlib

from cat_fast.complexity.prompt import Prompt
from cat_fast.complexity.scorers.language_model.calibration import ScoreCalibration
from cat_fast.complexity.scorers.language_model.replies import MIN_NEW_TOKENS
from cat_fast.errors import UserError


def scorer_version(identity: str, prompt: Prompt, scale: int, max_new_tokens: int) -> str:
    """Return the version of an uncalibrated scorer.

    Raises:
        UserError: the prompt does not ask for this scale, or replies would be too short.
    """
    prompt.check_scale(scale)
    if max_new_tokens < MIN_NEW_TOKENS:
        raise UserError(f"max_new_tokens must be at least {MIN_NEW_TOKENS}, got {max_new_tokens}")
    parts = (identity, prompt.hash, str(scale), str(max_new_tokens))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def calibrated_version(version: str, calibration: ScoreCalibration) -> str:
    """Return the version of a scorer with a calibration."""
    return hashlib.sha256(f"{version}\0{calibration.hash}".encode()).hexdigest()[:12]
