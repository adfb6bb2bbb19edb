"""Names of the files of a run, its shards, and the settings that are stored with scores."""

import glob
import hashlib
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cat_fast.complexity.image_score import ImageScorer
from cat_fast.complexity.ratios.thresholds import RatioThresholds
from cat_fast.complexity.score import Scorer
from cat_fast.errors import UserError

SUFFIX = ".parquet"
PARTIAL = ".partial"
"""Ending of the folder of unfinished scores, next to their file."""
DAMAGED = ".damaged"
"""Ending of a half-written file that was renamed."""
_SHARD_NAME = re.compile(r"-\d{5,}-of-\d{5,}\.parquet")


class Shard(NamedTuple):
    """Part of the samples that one of several processes scores: every `of`-th one, from number `part`."""

    part: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Parse the command-line form "I/N".

        Raises:
            UserError: not two integers with 0 <= I < N.
        """
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if not found or not int(found[1]) < int(found[2]):
            raise UserError(
                f"--shard {text}: expected I/N, shard I of N numbered from 0: for two processes 0/2 and 1/2"
            )
        return cls(int(found[1]), int(found[2]))

    def path(self, out: Path) -> Path:
        """Return the file of this shard: `scores-00000-of-00002.parquet` for `scores.parquet`."""
        return out if self.of == 1 else out.with_name(f"{out.stem}-{self.part:05d}-of-{self.of:05d}{SUFFIX}")

    def first_number(self, name: str) -> int:
        """Return the number of this shard's first sample of an input; it differs, so that many inputs of one
        sample are shared evenly."""
        return (self.part - zlib.crc32(name.encode())) % self.of


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Settings that the scores and ratios in a file depend on."""

    scorer: str
    version: str
    prompt_hash: str | None
    shard: Shard
    thresholds: tuple[float, float]
    mean_tokens: float | None
    """Budget of the mean tokens per sample; None if the thresholds decide alone."""

    @classmethod
    def of(
        cls,
        scorer: Scorer | ImageScorer,
        thresholds: RatioThresholds,
        mean_tokens: float | None = None,
        shard: Shard = Shard(),  # noqa: B008 # immutable
    ) -> "ScoreSettings":
        """Return the settings of a run with a scorer."""
        return cls(
            scorer=scorer.name,
            version=scorer.version,
            prompt_hash=_prompt_hash(scorer),
            shard=shard,
            thresholds=thresholds.pair,
            mean_tokens=mean_tokens,
        )

    @property
    def of_scores(self) -> dict[str, Any]:
        """Settings that the scores depend on, as JSON values; a resumed run must have the same ones."""
        return {
            "scorer": self.scorer,
            "version": self.version,
            "prompt_hash": self.prompt_hash,
            "shard": list(self.shard),
        }


def _prompt_hash(scorer: Any) -> str | None:
    """Return the hash of a language model's prompt; None for a scorer without one."""
    prompt = getattr(scorer, "prompt", None)
    if isinstance(prompt, str):
        return hashlib.sha256(prompt.encode()).hexdigest()[:12]
    if prompt is not None:
        return str(prompt.hash)
    # A scorer that escalates to a second one, or scores the descriptions of a captioner.
    parts = (getattr(scorer, name, None) for name in ("second", "scorer"))
    return next((found for part in parts if part is not None and (found := _prompt_hash(part))), None)


def shard_files(out: Path) -> list[Path]:
    """Return the existing files of the shards of `out`, in order."""
    return sorted(path for path in out.parent.glob(f"{glob.escape(out.stem)}-*") if is_shard_of(path, out))


def is_shard_of(path: Path, out: Path) -> bool:
    """Return whether a file has the name of a shard of `out`."""
    return path.parent == out.parent and _SHARD_NAME.fullmatch(path.name.removeprefix(out.stem)) is not None


def is_output_of(path: Path, out: Path) -> bool:
    """Return whether a file is `out`, a shard of it, or a half-written one that was renamed."""
    path, out = (Path(os.path.abspath(p)) for p in (path, out))
    whole = path.with_name(path.name.removesuffix(DAMAGED))
    return whole == out or is_shard_of(whole, out)
