"""Tables of docs/dual_token.md from the newest results of benchmarks/dual_token.py."""

from collections.abc import Mapping
from typing import Any

from benchmarks.documents import tables

DOCUMENT = tables.ROOT / "docs/dual_token.md"
_METRICS = {"psnr": 2, "ssim": 3}
_NAMES = {
    "guide": "guide",
    "contrastive": "contrastive",
    "codes": "codes",
    "language": "language model",
}


def filled(text: str) -> str:
    """Return the document with updated tables."""
    found = tables.results("dual_token")
    makers = {
        "stages": stages,
        "guides": guides,
        "semantic": semantic,
        "methods": methods,
        "differences": differences,
        "round_trip": round_trip,
        "language": language,
        "bounds": bounds,
    }
    return tables.fill(text, {name: make(found) for name, make in makers.items()})


def stages(found: Mapping[str, Any]) -> str:
    """Return the steps and the time of each stage."""
    rows = []
    for name, row in found["training"].items():
        rows.append((_NAMES[name], f"{row['steps']:,}", f"{row['cpu_minutes']:.1f}"))
    return tables.markdown(("stage", "steps", "CPU minutes"), rows)


def guides(found: Mapping[str, Any]) -> str:
    """Return PSNR and use of the codebook per guide size."""
    rows = []
    for pixels, row in found["guide"]["sizes"].items():
        cells = [_figure(row[name], 2) for name in ("psnr", "mean_colour_psnr", "gain")]
        used = f"{100 * row['codes_used']:.0f} %"
        rows.append((f"{pixels} px", str(row["tokens"]), *cells, used, f"{row['perplexity']:.0f}"))
    header = ("guide", "tokens", "PSNR in dB", "mean colour", "gain", "codes used", "perplexity")
    return tables.markdown(header, rows)


def semantic(found: Mapping[str, Any]) -> str:
    """Return retrieval, and the figures of codes and text states."""
    rows = []
    for name, row in found["retrieval"]["sets"].items():
        figures = [f"{_figure(row[rank], 1, 100)} %" for rank in ("at_1", "at_5")]
        label = name.replace("_", "-", 1).replace("_", " ")
        rows.append((f"retrieval among 100 {label} pairs, rank 1", figures[0], "1 %"))
        rows.append((f"retrieval among 100 {label} pairs, rank 5", figures[1], "5 %"))
    codes = found["codes"]
    mean = codes["mean_state"]
    rows += [
        ("cosine of decoded and true embeddings", f"{codes['embedding_cosine']:.3f}", ""),
        ("cosine of text states", f"{codes['state_cosine']:.3f}", f"{mean['state_cosine']:.3f}"),
        ("squared error of text states", f"{codes['state_mse']:.4f}", f"{mean['state_mse']:.4f}"),
        ("number of text states exact", f"{100 * codes['lengths_exact']:.0f} %", ""),
        (f"codes used of {codes['codebook_size']}", f"{100 * codes['codes_used']:.0f} %", ""),
        ("perplexity of the codes", f"{codes['perplexity']:.0f}", ""),
    ]
    return tables.markdown(("held-out figure", "value", "chance, or mean state"), rows)


def methods(found: Mapping[str, Any]) -> str:
    """Return the metrics of each method."""
    part = found["rerendering"]
    distance = _distance(part)
    rows = []
    for name, row in part["methods"].items():
        if not row["images"]:
            continue
        cells = [_figure(row[metric], digits) for metric, digits in _METRICS.items()]
        counts = ["" if row[unit] is None else f"{row[unit]:.0f}" for unit in ("tokens", "bits")]
        rows.append((name, *counts, *cells, _figure(row[distance], 3), str(row["images"])))
    header = ("method", "tokens", "bits", "PSNR in dB", "SSIM", f"{distance} distance", "images")
    return tables.markdown(header, rows)


def differences(found: Mapping[str, Any]) -> str:
    """Return the differences of re-rendered images from other methods, paired over images."""
    part = found["rerendering"]
    distance = _distance(part)
    rows = []
    for name, row in part["differences"].items():
        if name.startswith(("re-rendered", "true text")):
            rows.append((name.replace(" - ", " − "), _figure(row[distance], 3), _figure(row["psnr"], 2)))
    return tables.markdown(("difference", f"{distance} distance", "PSNR in dB"), rows)


def round_trip(found: Mapping[str, Any]) -> str:
    """Return the errors of round trips per number of steps."""
    part = found["round_trip"]
    rows = [(name, *(f"{100 * error:.2f} %" for error in errors)) for name, errors in part["errors"].items()]
    return tables.markdown(("round trip", *(f"{steps} steps" for steps in part["steps"])), rows)


def language(found: Mapping[str, Any]) -> str:
    """Return bits per id, and the upper ends of the intervals of the differences."""
    part = found["language"]
    rows = [("language model, right caption", f"{part['bits']:.3f}", "")]
    for name, label in (
        ("bits_with_other_captions", "language model, caption of another image"),
        ("bits_of_bigrams", "bigram counts"),
        ("bits_of_unigrams", "unigram counts"),
    ):
        upper = part[f"{name}_difference_upper"]
        rows.append((label, f"{part[name]:.3f}", f"{upper:+.3f}".replace("-", "−")))
    return tables.markdown(("held-out pairs", "bits per id", "upper end of the difference to it"), rows)


def bounds(found: Mapping[str, Any]) -> str:
    """Return the seconds to encode and to decode an image, and their bounds."""
    part = found["bounds"]
    rows = []
    for what, label in (("encode", "encode, 16 x 16 tokens"), ("decode", "decode, 50 + 50 steps")):
        figures = [f"{part[f'{what}_{kind}']:.2f}" for kind in ("cpu_seconds", "seconds")]
        rows.append((label, *figures, f"{part['bounds'][f'{what}_seconds']:.0f}"))
    header = (
        f"slowest of {part['images']} images of 128 px, one thread",
        "CPU seconds",
        f"seconds at load {part['load']:.0f}",
        "bound",
    )
    return tables.markdown(header, rows)


def _distance(part: Mapping[str, Any]) -> str:
    """Return the name of the perceptual distance of an evaluation."""
    names = next(iter(part["differences"].values()))
    return next(name for name in names if name not in _METRICS)


def _figure(row: Mapping[str, Any], digits: int, scale: float = 1) -> str:
    low, high = (scale * bound for bound in row["interval"])
    text = f"{scale * row['value']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
    return text.replace("-", "−")
