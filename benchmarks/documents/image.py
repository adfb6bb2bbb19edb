"""Tables of docs/scoring_images.md from the report of the packaged image student."""

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.documents import tables

DOCUMENT = tables.ROOT / "docs/scoring_images.md"
REPORT = tables.ROOT / "cat_fast/complexity/assets/image_student.json"


def filled(text: str) -> str:
    """Return the document with updated tables."""
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    return tables.fill(
        text,
        {
            "trials": trials(report),
            "training images": training_images(report),
            "speed": speed(report),
            "detectors": detectors(tables.results("detectors")),
        },
    )


def trials(report: Mapping[str, Any]) -> str:
    """Return quality and difference from JPEG sizes of each trial."""
    rows = []
    for name, row in report["trials"].items():
        cells = [f"{row[measure]['value']:.3f}" for measure in ("agreement", "spearman")]
        for measure in ("agreement", "spearman"):
            found = row.get("over_jpeg", {}).get(measure)
            cells.append(
                f"{found['value']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})" if found else ""
            )
        further = row["spearman_further"]
        cells.append("" if further is None else f"{further:.3f}")
        mix = "/".join(f"{100 * share:.0f}" for share in row["mix"].values())
        rows.append((f"**{name}**" if name == report["head"] else name, *cells, mix))
    header = (
        "model",
        "ratio agreement",
        "Spearman",
        "agreement over JPEG",
        "Spearman over JPEG",
        "Spearman, further images",
        "8x/16x/32x",
    )
    return tables.markdown(header, rows)


def training_images(report: Mapping[str, Any]) -> str:
    """Return number and licence of the training images per source."""
    rows = [
        (name.replace("_", " "), f"{row['images']:,}", row["licence"])
        for name, row in report["training_images"].items()
    ]
    return tables.markdown(("source", "images", "licence"), rows)


def speed(report: Mapping[str, Any]) -> str:
    """Return size of the file and CPU time per image."""
    found = report["speed"]
    row = (
        f"{report['file_bytes'] / 1e6:.2f} MB",
        f"{1000 * found['cpu_seconds_per_image']:.0f} ms",
        f"{found['images_per_second_on_two_cores']:.0f}",
        f"{found['times_decoding']:.1f}",
        found["processor"],
    )
    header = (
        "file",
        "CPU time per image",
        "images per second on two cores",
        "time over that of decoding",
        "processor",
    )
    return tables.markdown(header, [row])


_SETS = {"photographs": "56 packaged photographs", "imagenet_sample": "712 ImageNet photographs"}


def detectors(report: Mapping[str, Any]) -> str:
    """Return the agreement of the detectors per set of images and flag."""
    rows = []
    for name, found in report["sets"].items():
        for flag, counts in found["counts"].items():
            right = counts["both"] + counts["neither"]
            cells = [f"{right} of {found['images']} ({100 * found['agreement'][flag]:.1f} %)"]
            cells += [str(counts[key]) for key in ("both", "missed", "found_only")]
            rows.append((_SETS[name], flag, *cells))
    header = ("images", "flag", "agreement", "found", "missed", "false positives")
    return tables.markdown(header, rows)
