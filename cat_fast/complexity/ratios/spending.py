"""Notice of the tokens that a run spends with other thresholds than the scores' own, or mixed scorers."""

from collections import Counter
from collections.abc import Mapping

from cat_fast.complexity.ratios.thresholds import default_thresholds
from cat_fast.complexity.scorers.loading import DISTILLED
from cat_fast.data.images.size import Size, height_and_width
from cat_fast.data.ratio_origin import Pair, RatioOrigin

_PATCH = 2
_UNRECORDED = "an unrecorded scorer"


def spending_notice(origins: Mapping[RatioOrigin, int], mix: Mapping[int, float], size: Size) -> str | None:
    """Return a line about other thresholds than those of the scores, and mixed scorers; None if neither.

    It ends with the mean tokens per image that result. Scores without a recorded scorer count as those of
    another scorer, to which the default thresholds belong.

    Args:
        origins: number of images per origin of their ratio.
        mix: images or shares per ratio, in any unit.
        size: size of the images in pixels.
    """
    scored = {o: n for o, n in origins.items() if o.source in ("score", "caption") or o.scored_by}
    reasons = [*_other_thresholds(scored), *_mixed(scored)]
    total = sum(mix.values())
    if not reasons or not total:
        return None
    tokens = sum(share * _tokens(ratio, size) for ratio, share in mix.items()) / total
    fixed = _tokens(16, size)
    return (
        f"ratios: {'; '.join(reasons)}: mean {tokens:.1f} tokens per image at {_pixels(size)} px, against"
        f" {fixed:g} at a fixed 16x ({tokens / fixed - 1:+.1%})"
    )


def _other_thresholds(scored: Mapping[RatioOrigin, int]) -> list[str]:
    default, found = default_thresholds().pair, set()
    for origin in scored:
        own = origin.scored_by.thresholds if origin.scored_by else default
        applied = origin.thresholds or own
        if origin.source == "ratio" and origin.scored_by and origin.scored_by.scorer in DISTILLED:
            own = default
        if applied != own:
            name = origin.scored_by or _UNRECORDED
            kind = "thresholds of" if origin.scored_by else "default thresholds, for scores of"
            found.add(f"thresholds {_text(applied)} instead of {_text(own)}, the {kind} {name}")
    return sorted(found)


def _mixed(scored: Mapping[RatioOrigin, int]) -> list[str]:
    scorers: Counter[str] = Counter()
    pairs = set()
    for origin, images in scored.items():
        scorers[str(origin.scored_by or _UNRECORDED)] += images
        if origin.source == "ratio" and origin.scored_by:
            pairs.add(origin.scored_by.thresholds)
    reasons = []
    if len(scorers) > 1:
        parts = ", ".join(f"{name} {n / scorers.total():.0%}" for name, n in sorted(scorers.items()))
        reasons.append(f"scores of {len(scorers)} scorers are mixed ({parts})")
    elif len(pairs) > 1:
        reasons.append(f"ratios by thresholds {' and '.join(map(_text, sorted(pairs)))} are mixed")
    return reasons


def _tokens(ratio: int, size: Size) -> float:
    """Return the tokens of an image, by area: of any ratio, also where it does not divide into patches."""
    height, width = height_and_width(size)
    return height * width / (ratio * _PATCH) ** 2


def _pixels(size: Size) -> str:
    height, width = height_and_width(size)
    return f"{height}" if height == width else f"{height} × {width}"


def _text(pair: Pair) -> str:
    return f"{pair[0]},{pair[1]}"
