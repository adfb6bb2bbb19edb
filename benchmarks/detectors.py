"""Agreement of the detectors of text and faces with flags by people, and their CPU time per image.

    python -m benchmarks.detectors --json FILE [--imagenet-sample FOLDER]

The flags of the packaged photographs are those of their attribution list. `--imagenet-sample` adds the
ImageNet photographs of the packaged rated captions, which are not distributed; their flags were seen in the
pixels.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.shared import machine
from cat_fast import console
from cat_fast.complexity.captioners.detectors import Detectors
from cat_fast.complexity.captions import read_rows
from cat_fast.complexity.rated_captions import RATED_CAPTIONS
from cat_fast.data.files import atomic_write, require_writable
from cat_fast.data.images.io import load_image
from cat_fast.data.photographs import photographs
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command

Image = tuple[str, Path, bool, bool]
"""Name, file, and the flags of text and faces."""


def main() -> int:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(
        description="Agreement of detectors with flags by people, and their cost."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument(
        "--imagenet-sample", type=Path, metavar="FOLDER", help="ImageNet photographs, by name"
    )
    given = parser.parse_args()
    try:
        if given.json is not None:
            require_writable(given.json)
        detectors = Detectors()
        own = [(photo.key, photo.path, photo.has_text, photo.has_faces) for photo in photographs()]
        sets = {"photographs": measure(detectors, own, names=True)}
        if given.imagenet_sample is not None:
            sets["imagenet_sample"] = measure(detectors, imagenet_sample(given.imagenet_sample))
    except UserError as error:
        console.err.print(str(error), markup=False)
        return 2
    result = {
        "benchmark": "detectors",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine.describe(),
        "detectors": {"version": detectors.version, "packages": detectors.packages},
        "sets": sets,
    }
    console.out.print_json(json.dumps(sets))
    if given.json is not None:
        with atomic_write(given.json) as path:
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def imagenet_sample(folder: Path) -> list[Image]:
    """Return the photographs in a folder that have rated captions."""
    rows = [row for _, row in read_rows(RATED_CAPTIONS / "imagenet_sample.jsonl")]
    found = [(row["file"], folder / row["file"], row["has_text"], row["has_faces"]) for row in rows]
    if missing := [name for name, path, *_ in found if not path.is_file()]:
        raise UserError(
            f"{folder}: {len(missing)} of {len(found)} photographs are missing, such as {missing[0]}"
        )
    return found


def measure(detectors: Detectors, images: Iterable[Image], names: bool = False) -> dict[str, Any]:
    """Return the confusion counts per flag, and the CPU seconds per image without decoding.

    Args:
        detectors: the captioner.
        images: with their flags.
        names: also list the images with another flag.
    """
    flags = ("text", "faces")
    counts = {flag: {"both": 0, "neither": 0, "found_only": 0, "missed": 0} for flag in flags}
    others: dict[str, list[str]] = {flag: [] for flag in flags}
    seconds = []
    for name, path, *expected in images:
        image = load_image(path)
        start = time.process_time()
        found = detectors.find_flags(image)
        seconds.append(time.process_time() - start)
        for flag, got, wanted in zip(flags, found, expected, strict=True):
            key = ("both" if wanted else "found_only") if got else ("missed" if wanted else "neither")
            counts[flag][key] += 1
            if got != wanted:
                others[flag].append(name)
    total = len(seconds)
    rates = {flag: round((c["both"] + c["neither"]) / total, 4) for flag, c in counts.items()}
    time_per_image = {"mean": round(sum(seconds) / total, 3), "max": round(max(seconds), 3)}
    result = {"images": total, "agreement": rates, "counts": counts, "cpu_seconds": time_per_image}
    return result | ({"other_flag": others} if names else {})


if __name__ == "__main__":
    sys.exit(run_command(main))
