"""Captions and images scored per second, against the published seconds per image of language models.

    python -m benchmarks.scoring --json FILE [--quick]

Measured is the processor time of one thread: the distilled scorers on packaged captions, and the bytes of a
JPEG file on the packaged photographs. An image has one caption, so `rates` of a scorer are both. Start-up and
peak memory are those of processes that score one and 4,000 captions. The accurate scorer is also compared
with itself, in alternating rounds on all threads, with its matrix products by MKL and by oneDNN; `library`
names the one that it uses. --quick leaves out all but the rates.

Published are 1 s per caption (a language model), 1.63 s per image (one vision-language model) and 1.84 s per
image (captioner and language model) on an H100; another table of the paper gives about 50 ms for the same
step. The ratios compare one CPU core with an H100, and a caption that exists with an image that is to be
described.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.linear import compare
from benchmarks.shared import simple_program
from benchmarks.shared.steps import Step, count_flops
from cat_fast.complexity.distillation.footprint import measure_footprint
from cat_fast.complexity.rated_captions import read_rated
from cat_fast.complexity.scorers.accurate.scorer import AccurateScorer
from cat_fast.complexity.scorers.loading import DISTILLED, load_scorer
from cat_fast.complexity.scoring_run.cost import PUBLISHED_SPEEDS, measure_speed
from cat_fast.complexity.signals.jpeg_size import JPEG_SIDE, jpeg_bytes
from cat_fast.data.images.io import image_to_bytes, load_image, resize_center_crop
from cat_fast.data.photographs import photographs
from cat_fast.kernels.linear.op import processor_backend, using
from cat_fast.processes.signals import run_command

CAPTIONS, ROUNDS = 400, 5
"""Captions per call, which count as images, and rounds of the comparison of libraries."""


def measure(quick: bool) -> dict[str, Any]:
    """Return seconds per caption or image of every scorer, and how many published times fit into each."""
    scorers: dict[str, dict[str, Any]] = {
        name: {"seconds": measure_speed(name, load_scorer(name)).seconds, "scope": "caption"}
        for name in DISTILLED
    }
    if not quick:
        for name in DISTILLED:
            scorers[name]["footprint"] = measure_footprint(name)
        scorers["accurate"]["library"] = processor_backend()
        scorers["accurate"]["libraries"] = compare(scorer_step(AccurateScorer.load(), CAPTIONS), ROUNDS)
    scorers["jpeg"] = {"seconds": jpeg_seconds(8 if quick else 40), "scope": "image"}
    published = {speed.name: speed.seconds for speed in PUBLISHED_SPEEDS}
    for found in scorers.values():
        units = ("images", "captions") if found["scope"] == "caption" else ("images",)
        found["rates"] = dict.fromkeys(units, 1 / found["seconds"])
        found["ratio_vs_published"] = {
            name: seconds / found["seconds"] for name, seconds in published.items()
        }
    return {"scorers": scorers, "published_seconds": published}


def scorer_step(scorer: AccurateScorer, captions: int) -> Step:
    """Set up the scoring of packaged captions, whose layers then use the library of the process."""
    for layer in scorer.linears:
        layer.backend = None
    rows = read_rated()
    descriptions = [row.description for row in rows[:: len(rows) // captions][:captions]]
    with using("mkl"):
        flops = count_flops(lambda: scorer.score_many(descriptions))
    return Step(
        run=lambda: scorer.score_many(descriptions),
        images=len(descriptions),
        tokens=sum(map(len, scorer.encoder.tokens([d.caption for d in descriptions]))),
        flops=flops,
        precision="fp32",
    )


def jpeg_seconds(count: int) -> float:
    """Return the processor time of one image's JPEG size, without decoding and resizing the file."""
    images = [
        image_to_bytes(resize_center_crop(load_image(photograph.path), JPEG_SIDE))
        for photograph in photographs()[:count]
    ]
    start = time.process_time()
    for image in images:
        jpeg_bytes(image)
    return (time.process_time() - start) / len(images)


def lines(found: Mapping[str, Any]) -> Sequence[str]:
    """Format the results, one scorer per line."""
    published = found["published_seconds"]
    rows = [
        f"{name}: {', '.join(f'{rate:.4g} {unit}/s' for unit, rate in row['rates'].items())} per core; "
        + ", ".join(
            f"{ratio:.3g} x {other} ({published[other]:g} s)"
            for other, ratio in row["ratio_vs_published"].items()
        )
        for name, row in found["scorers"].items()
    ]
    if libraries := found["scorers"]["accurate"].get("libraries"):
        rows.append(
            f"accurate: {libraries['mkl_over_onednn']['median']:.2f} times as fast with oneDNN as with MKL;"
            f" MKL against itself {libraries['mkl_over_mkl']['median']:.2f}"
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return simple_program.main("scoring", __doc__ or "", measure, lines, arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
