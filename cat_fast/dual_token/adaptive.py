"""Adaptive guides: the complexity score of a description chooses the number of guide tokens of its image.

Neither of the two methods that this package implements has this: the dual-token tokenizer uses one guide size
for all images, the content-adaptive one has no discrete tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cat_fast.complexity import Description, Scorer, default_scorer, require_scores
from cat_fast.data.images.label_fields import SCORES
from cat_fast.dual_token.grid import SIDES, Grid
from cat_fast.errors import UserError
from cat_fast.inference.encoding.photo_descriptions import PhotoDescriptions
from cat_fast.integers import to_integers

_MISSING = UserError(
    "no description to choose the number of tokens from: give --captions, --caption or a text file next to"
    " the image, or set --grid"
)


@dataclass(frozen=True)
class GridThresholds:
    """Scores at which the guide grows: up to a 4 tokens, up to b 16, up to c 64, above 256.

    By default (2, 4, 7): b and c are the published thresholds of compression ratios, and a splits the images
    that get 32x there.

    Raises:
        UserError: not increasing scores.
    """

    a: int = 2
    b: int = 4
    c: int = 7

    def __post_init__(self) -> None:
        limits = to_integers("grid thresholds", (self.a, self.b, self.c))
        if not SCORES[0] - 1 <= limits[0] <= limits[1] <= limits[2] <= SCORES[-1]:
            raise UserError(
                f"grid thresholds: expected three increasing scores within {SCORES[0] - 1} .. {SCORES[-1]},"
                f" got {self.a}, {self.b}, {self.c}"
            )

    @classmethod
    def parse(cls, text: str) -> "GridThresholds":
        """Parse `2,4,7`.

        Raises:
            UserError: another text, or not increasing scores.
        """
        parts = text.split(",")
        if len(parts) != len(SIDES) - 1 or not all(part.strip().isdigit() for part in parts):
            raise UserError(f"grid thresholds {text}: expected three scores, such as 2,4,7")
        return cls(*(int(part) for part in parts))

    def grid_of(self, score: int) -> Grid:
        """Return the grid of a score 1..9."""
        side = SIDES[sum(score > limit for limit in (self.a, self.b, self.c))]
        return side, side


@dataclass(frozen=True)
class GridChoice:
    """The grid of an image, and the score that chose it."""

    grid: Grid
    score: int


def choose_grids(
    descriptions: Sequence[Description],
    thresholds: GridThresholds | None = None,
    scorer: Scorer | None = None,
) -> list[GridChoice]:
    """Score descriptions and choose the grids of their images, in order.

    Raises:
        UserError: a description cannot be scored.
    """
    thresholds = thresholds or GridThresholds()
    if not descriptions:
        return []
    scores = require_scores(scorer or default_scorer(), descriptions)
    return [GridChoice(thresholds.grid_of(score.score), score.score) for score in scores]


def grids_of_images(
    descriptions: PhotoDescriptions, files: Sequence[Path], thresholds: GridThresholds | None = None
) -> list[Grid | UserError]:
    """Return the grid of each image file, or an error for one without a readable description."""
    found: list[Description | UserError] = []
    for file in files:
        try:
            found.append(descriptions.find(file) or _MISSING)
        except UserError as error:
            found.append(error)
    known = [one for one in found if isinstance(one, Description)]
    grids = iter(choose_grids(known, thresholds))
    return [next(grids).grid if isinstance(one, Description) else one for one in found]
