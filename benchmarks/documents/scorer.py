"""Tables of docs/distilled_scorers.md from the reports of the packaged scorers."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from benchmarks.documents import ratio, tables

DOCUMENT = tables.ROOT / "docs/distilled_scorers.md"
ASSETS = tables.ROOT / "cat_fast/complexity/assets"
TIERS = ("accurate", "fast")
STATES = ("given", "inferred")
TOLERANCE = 0.06  # of the shares of a mix


def filled(text: str) -> str:
    """Return the document with updated tables."""
    reports = {
        tier: json.loads((ASSETS / f"{tier}_scorer.json").read_text(encoding="utf-8")) for tier in TIERS
    }
    makers = {
        "quality": quality,
        "mixes": mixes,
        "mixes chance": mixes_chance,
        "reliability": reliability,
        "paraphrases": paraphrases,
    }
    return tables.fill(text, {name: make(reports) for name, make in makers.items()})


def quality(reports: Mapping[str, Any]) -> str:
    """Return agreement, Spearman and error per source, of each tier and of one rater with the other."""
    first = reports["accurate"]
    rows = []
    for source in ("all", *first["sources"]):
        cells = [
            _figures(
                {
                    name: found["value"]
                    for name, found in _group(reports[tier], source)[state].items()
                    if name in _DIGITS
                }
            )
            for tier in TIERS
            for state in STATES
        ]
        rows.append(
            (
                _label(source),
                f"{_group(first, source)['given']['captions']:,}",
                *cells,
                _figures(first["raters"][source]),
            )
        )
    header = (
        "source",
        "captions",
        *(f"{tier}, flags {state}" for tier in TIERS for state in STATES),
        "rater and rater",
    )
    return tables.markdown(header, rows)


def mixes(reports: Mapping[str, Any]) -> str:
    """Return one row per source and domain: mixes of the raters, the tiers and the publication."""
    published = {name: mix for name, (_, mix) in ratio.SOURCES.items() if mix} | ratio.DOMAINS
    first = reports["accurate"]
    rows = []
    groups = [(group, name) for group in ("sources", "written_domains") for name in first[group]]
    for group, name in groups:
        found = [reports[tier][group][name]["given"] for tier in TIERS]
        label = _label(name) if group == "sources" else f"written: {name.replace('_', ' ')}"
        mix = "/".join(map(str, published[name])) if name in published else ""
        difference = found[0]["mix_difference"]
        cells = [_mix(found[0]["reference_mix"].values()), *(_mix(one["mix"].values()) for one in found)]
        chance = f"{100 * unbiased_within_tolerance(found[0]):.0f} %"
        rows.append((label, f"{found[0]['captions']:,}", *cells, f"{100 * difference:.1f}", chance, mix))
    header = (
        "source",
        "captions",
        "raters",
        *TIERS,
        "largest difference of accurate",
        "unbiased within 6",
        "published",
    )
    return tables.markdown(header, rows)


def mixes_chance(reports: Mapping[str, Any]) -> str:
    """Return the probability that an unbiased scorer has all mixes of written domains within 6 points."""
    domains = reports["accurate"]["written_domains"].values()
    chance = np.prod([unbiased_within_tolerance(domain["given"]) for domain in domains])
    return (
        f"All {len(domains)} domains of the written captions would be within 6 points with a probability of"
        f" {100 * chance:.0f} %.\n"
    )


def unbiased_within_tolerance(found: Mapping[str, Any], draws: int = 20_000) -> float:
    """Return the probability that a scorer without bias has the mix of a group within 6 points.

    The scorer agrees with the raters as often as the measured one. Its errors are between neighbouring
    ratios, as often up as down, and as frequent at each boundary as the rarer of its two ratios.
    """
    random = np.random.default_rng(0)
    first, middle, last = found["reference_mix"].values()
    weights = np.array([min(first, middle), min(middle, last)])
    captions = found["captions"]
    errors = random.binomial(captions, 1 - found["agreement"]["value"], draws)
    at_first = random.binomial(errors, weights[0] / weights.sum())
    flows = [2 * random.binomial(count, 0.5) - count for count in (at_first, errors - at_first)]
    changes = np.stack([flows[0], flows[1] - flows[0], flows[1]]) / captions
    return float((np.abs(changes).max(axis=0) <= TOLERANCE).mean())


def reliability(reports: Mapping[str, Any]) -> str:
    """Return confidence and accuracy of each tenth of the captions."""
    rows = []
    for tier in TIERS:
        for state in STATES:
            found = reports[tier]["reliability"][state]
            bins = [f"{100 * b['confidence']:.0f}/{100 * b['accuracy']:.0f}" for b in found["bins"]]
            rows.append((f"{tier}, {state}", *bins, f"{100 * found['expected_calibration_error']:.1f}"))
    return tables.markdown(("scorer, flags", *map(str, range(1, 11)), "error"), rows)


def paraphrases(reports: Mapping[str, Any]) -> str:
    """Return mean change and kept ratios per kind of paraphrase."""
    rows = []
    for name in reports["accurate"]["paraphrases"]:
        cells = []
        for tier in TIERS:
            found = reports[tier]["paraphrases"][name]
            cells += [f"{found['mean_change']:.2f}", f"{100 * found['same_ratio']:.1f} %"]
        rows.append((name, *cells))
    header = ("paraphrase", *(f"{tier}: {what}" for tier in TIERS for what in ("mean change", "same ratio")))
    return tables.markdown(header, rows)


_LABELS = {"all": "all", "imagenet_style": "ImageNet style, written"}
_DIGITS = {"agreement": 3, "spearman": 3, "mae": 2}


def _figures(found: Mapping[str, float]) -> str:
    return " / ".join(f"{found[name]:.{digits}f}" for name, digits in _DIGITS.items())


def _group(report: Mapping[str, Any], name: str) -> Any:
    return report["all"] if name == "all" else report["sources"][name]


def _label(source: str) -> str:
    return _LABELS.get(source) or ratio.SOURCES[source][0].partition(",")[0]


def _mix(shares: Iterable[float]) -> str:
    return "/".join(f"{100 * share:.0f}" for share in shares)
