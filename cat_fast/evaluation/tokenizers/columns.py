"""Columns of an evaluation: a tokenizer and the rule that chooses its rate per image.

adaptive      by score and thresholds, as the tokenizer is meant to be used
8, 16, 32     the same ratio for all images; a number of tokens for one-dimensional tokenizers
equalized     all images at 16x: the paper's Table 12, which equalizes the token counts of images
budget=N      by score, with N tokens per image on average (patch size 2)
jpeg          by the JPEG size of the image
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cat_fast.complexity import RATIOS, RatioThresholds, default_thresholds, ratios_within_budget
from cat_fast.errors import UserError
from cat_fast.evaluation.tokenizers.protocol import ImageTokenizer

EQUALIZED = 16
_NAMES = "adaptive, equalized, jpeg, budget=N, or one of its ratios"


@dataclass(frozen=True)
class Scored:
    """Labels of an image that a rule chooses by."""

    key: str
    score: int | None = None
    expected: float | None = None


class KnownScore(NamedTuple):
    """A score, as thresholds take it."""

    score: int
    expected: float | None


@dataclass(frozen=True)
class Column:
    """A tokenizer and a rule."""

    tokenizer: ImageTokenizer
    rule: str
    thresholds: RatioThresholds

    @property
    def name(self) -> str:
        """Unique name in results."""
        suffix = ("x" if self.tokenizer.is_spatial else " tokens") if self.rule.isdecimal() else ""
        return f"{self.tokenizer.name} {self.rule}{suffix}"

    @property
    def needs_scores(self) -> bool:
        return self.rule == "adaptive" or self.rule.startswith("budget=")

    @property
    def fixed(self) -> int | None:
        """The choice of a rule that is the same for all images."""
        if self.rule == "equalized":
            return EQUALIZED
        return int(self.rule) if self.rule.isdecimal() else None

    def choose(self, images: Sequence[Scored], side: int) -> list[int | None]:
        """Return the choice of each image; None where the image itself decides (`jpeg`).

        Images without a score must have been left out if the rule needs one.
        """
        if self.fixed is not None or self.rule == "jpeg":
            return [self.fixed] * len(images)
        known = [KnownScore(image.score or 0, image.expected) for image in images]
        if self.rule == "adaptive":
            return [self.thresholds.ratio_of(score) for score in known]
        expected = [float(score.score) if score.expected is None else score.expected for score in known]
        budget = float(self.rule.removeprefix("budget="))
        return list(ratios_within_budget(expected, budget, resolution=side))


def parse_columns(
    tokenizer: ImageTokenizer, rules: Sequence[str], thresholds: RatioThresholds | None = None
) -> list[Column]:
    """Return the columns of a tokenizer; without rules, one per ratio.

    Raises:
        UserError: an unknown rule, or a ratio that the tokenizer does not have.
    """
    found = []
    for rule in rules or [str(choice) for choice in tokenizer.choices]:
        rule = rule.strip().removesuffix("x")
        column = Column(tokenizer, rule, thresholds or default_thresholds())
        needed: tuple[int, ...]
        if rule.isdecimal() or rule == "equalized":
            needed = (column.fixed or 0,)
        elif rule in ("adaptive", "jpeg") or _is_budget(rule):
            needed = RATIOS
        else:
            raise UserError(f"ratio {rule!r}: expected {_NAMES} ({_listed(tokenizer.choices)})")
        if missing := sorted(set(needed) - set(tokenizer.choices)):
            raise UserError(
                f"{tokenizer.name}: the rule {rule!r} needs {missing[0]}, but the tokenizer has"
                f" {_listed(tokenizer.choices)}"
            )
        if column not in found:
            found.append(column)
    return found


def require_distinct_names(columns: Sequence[Column]) -> None:
    """Raise UserError if two columns have one name."""
    names = [column.name for column in columns]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two columns are named {name!r}; name baselines with NAME=DIR")


def _is_budget(rule: str) -> bool:
    try:
        return rule.startswith("budget=") and float(rule.removeprefix("budget=")) > 0
    except ValueError:
        return False


def _listed(choices: Sequence[int]) -> str:
    return ", ".join(map(str, choices))
