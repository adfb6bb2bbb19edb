"""Tables of the complexity study in docs/scoring_images.md from benchmarks/results.

The results complexity_1000 and complexity_712 are copies of study.json of `cat-fast eval complexity`.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.documents import tables

DOCUMENT = tables.ROOT / "docs/scoring_images.md"
STUDIES = ("complexity_1000", "complexity_712")


def filled(text: str) -> str:
    """Return the document with updated tables."""
    everyone, described = (tables.results(name) for name in STUDIES)
    return tables.fill(
        text,
        {
            "complexity: best ratio": best_ratio(everyone),
            "complexity: verdicts": verdicts(everyone, described),
            "complexity: errors": errors(everyone),
            "complexity: metrics, 1000": metrics(everyone),
            "complexity: metrics, 712": metrics(described),
            "complexity: tolerances": tolerances(described),
            "complexity: ratios": ratios(described),
            "complexity: robustness": robustness(described),
        },
    )


def verdicts(*studies: Mapping[str, Any]) -> str:
    """Return the sentence of each study that compares the score with JPEG size."""
    return "".join(f"- {study['images']:,} photographs: {study['verdict']}\n" for study in studies)


def best_ratio(study: Mapping[str, Any]) -> str:
    """Return the share of images per best ratio and tolerance (Figure 2, left)."""
    names = [str(ratio) for ratio in study["ratios"]]
    rows = [
        (tau, *(f"{100 * mix[name]:.1f} %" for name in names)) for tau, mix in study["best_ratio"].items()
    ]
    return tables.markdown(("τ", *(f"{name}x" for name in names)), rows)


def errors(study: Mapping[str, Any]) -> str:
    """Return the mean errors per ratio."""
    names = [str(ratio) for ratio in study["ratios"]]
    rows = [
        ("mean MSE", *(f"{study['mse'][name]:.4f}" for name in names)),
        ("mean perceptual distance", *(f"{study['lpips'][name]:.3f}" for name in names)),
    ]
    return tables.markdown(("", *(f"{name}x" for name in names)), rows)


def metrics(study: Mapping[str, Any]) -> str:
    """Return correlation and agreement of each metric with the best ratio (Table 9), and its distance from
    the score under study."""
    rows = []
    for name, found in study["metrics"].items():
        gap = study["differences"].get(name, {}).get("pearson")
        rows.append(
            (
                name,
                _interval(found["pearson"]),
                "" if found["published"] is None else f"{found['published']:.2f}",
                _interval(found["spearman"]),
                f"{found['agreement']['value']:.2f}" if "agreement" in found else "",
                f"{found['agreement_fitted']['value']:.2f}",
                "" if gap is None else _interval(gap, sign="+"),
            )
        )
    first = next(iter(study["metrics"]))
    header = (
        "metric",
        "Pearson",
        "published",
        "Spearman",
        "agreement",
        "agreement, fitted",
        f"Pearson of {first} over it",
    )
    return tables.markdown(header, rows)


def tolerances(study: Mapping[str, Any]) -> str:
    """Return Pearson's correlation of each metric per tolerance."""
    rows = [
        (name, *(f"{r:.2f}" for r in found["pearson_at"].values()))
        for name, found in study["metrics"].items()
    ]
    return tables.markdown(("Pearson at τ", *study["best_ratio"]), rows)


def ratios(study: Mapping[str, Any]) -> str:
    """Return the mix of ratios that each metric's own thresholds choose (Tables 1 and 2)."""
    rows = [
        (
            name,
            "/".join(f"{100 * found['mix'][ratio]:.0f}" for ratio in ("8", "16", "32")),
            f"{found['cost']['average_ratio']:.2f}",
            f"{found['cost']['latent_side']:.1f}",
            f"{found['cost']['mean_tokens']:.0f}",
        )
        for name, found in study["metrics"].items()
        if "mix" in found
    ]
    return tables.markdown(("metric", "8x/16x/32x", "average ratio", "latent side", "mean tokens"), rows)


def robustness(study: Mapping[str, Any]) -> str:
    """Return how well pairs of scorers agree (Table 10)."""
    rows = [
        (" and ".join(pair["scorers"]), f"{100 * pair['agreement']:.1f} %", f"{pair['spearman']:.2f}")
        for pair in study["robustness"]["pairs"]
    ]
    return tables.markdown(("scorers", "same ratio", "Spearman"), rows)


def _interval(found: Mapping[str, float], sign: str = "") -> str:
    value, low, high = (f"{found[key]:{sign}.2f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
