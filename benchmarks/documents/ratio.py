"""Tables of docs/ratios.md: costs of the rated captions, and the pairs near a budget.

Scores are the means of the raters, whose halves round up. The published mixes are those of the sources.
"""

from collections.abc import Iterable, Mapping

from benchmarks.documents import tables
from cat_fast.complexity import (
    RATIOS,
    Candidate,
    RatioThresholds,
    default_thresholds,
    mean_tokens,
    round_score,
)
from cat_fast.complexity.rated_captions import RatedCaption, read_rated

DOCUMENT = tables.ROOT / "docs/ratios.md"
SOURCES = {
    "coco": ("COCO, two ratings", (9, 54, 37)),
    "coco_single_rating": ("COCO, one rating", (9, 54, 37)),
    "imagenet_sample": ("ImageNet photographs", (6, 49, 45)),
    "imagenet_style": ("ImageNet style, written", (6, 49, 45)),
    "parti": ("PartiPrompts", None),
    "written": ("written", None),
}
"""Name and published mix (8x, 16x, 32x in percent) of each source."""
DOMAINS = {"faces": (17, 83, 0), "documents": (96, 4, 0), "textures": (0, 40, 60)}
"""Published mixes of data sets with the content of a domain: CelebA, ChartQA and DTD."""
PUBLISHED_SHARES = {2: 0.10, 4: 0.32, 7: 0.48, 8: 0.095, 9: 0.005}
"""Published distribution: the share of scores up to 2, 3 to 4, 5 to 7, 8 and 9."""
PUBLISHED_PAIRS = (RatioThresholds(4, 7), RatioThresholds(2, 8))


def filled(text: str) -> str:
    """Return the document with updated tables."""
    rated = read_rated()
    return tables.fill(text, {"costs": costs(rated), "pairs": pairs(rated)})


def costs(rated: Iterable[RatedCaption]) -> str:
    """Return one row per source and domain: the mix of the default pair and its mean tokens."""
    groups: dict[str, list[int]] = {name: [] for name in (*SOURCES, *DOMAINS)}
    for row in rated:
        groups[row.source].append(round_score(row.mean))
        if row.domain in DOMAINS:
            groups[row.domain].append(round_score(row.mean))
    rows = []
    for name, scores in groups.items():
        label, published = SOURCES.get(name, (f"written: {name}", DOMAINS.get(name)))
        measured = Candidate.measure(default_thresholds(), scores)
        cells = ["", ""]
        if published:
            cells = ["/".join(map(str, published)), f"{mean_tokens(_shares(published)):.0f}"]
        rows.append(
            (label, f"{len(scores):,}", _percent(measured.mix), f"{measured.mean_tokens:.1f}", *cells)
        )
    header = ("source", "captions", "8x/16x/32x, %", "mean tokens", "published mix", "its mean tokens")
    return tables.markdown(header, rows)


def pairs(rated: Iterable[RatedCaption]) -> str:
    """Return the pairs within 5 % of 16x in average rate: published distribution, then COCO."""
    coco = [round_score(row.mean) for row in rated if row.source.startswith("coco")]
    rows = []
    for label, scores in (("published", PUBLISHED_SHARES), ("COCO, rated", coco)):
        found = RatioThresholds.candidates(scores)
        if scores is PUBLISHED_SHARES:  # of pairs with equal mixes, those that the paper names
            found = [one for one in found if one.thresholds in PUBLISHED_PAIRS]
        rows += [
            (
                label,
                f"({one.thresholds.a}, {one.thresholds.b})",
                _percent(one.mix, digits=1),
                f"{one.average_ratio:.2f}x",
                f"{one.mean_tokens:.1f}",
                f"{one.entropy:.2f}",
            )
            for one in found
        ]
    header = ("scores", "pair", "8x/16x/32x, %", "average rate", "mean tokens", "entropy")
    return tables.markdown(header, rows)


def _shares(percent: Iterable[float]) -> dict[int, float]:
    shares = dict(zip(RATIOS, percent, strict=True))
    return {ratio: share / sum(shares.values()) for ratio, share in shares.items()}


def _percent(mix: Mapping[int, float], digits: int = 0) -> str:
    return "/".join(f"{100 * share:.{digits}f}" for share in mix.values())
