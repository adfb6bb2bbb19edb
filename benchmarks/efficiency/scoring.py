"""Seconds of scoring, and its share in scoring and training."""

from collections.abc import Mapping

from benchmarks.efficiency.row import Measured, Results, Row
from benchmarks.shared.mixes import TOKENIZER_TRAINING

TRAINED_IMAGES, SECONDS_PER_IMAGE = 380e6, 1.63
"""Images of the tokenizer's training set, and the published H100-seconds of describing and scoring one."""
TOKENIZER_STEPS, TOKENIZER_BATCH = 1_000_000, 512
UTILIZATION = 0.4
"""Low end of the share of the peak that training reaches."""
SCORERS = {"accurate": "caption", "jpeg": "image"}
"""Scorers of the package whose seconds are shown, and what they score."""


def share_rows(step_seconds: Mapping[int, float], images: int, results: Results) -> list[Row]:
    """Return estimates of the share of scoring in scoring and the tokenizer's training.

    The first row has the published seconds, the others those of our scorers.

    Args:
        step_seconds: seconds of a training step's products at the peaks of an A100, by ratio.
        images: images of that step.
        results: with the seconds of our scorers.
    """
    per_image = sum(share * step_seconds[ratio] for ratio, share in TOKENIZER_TRAINING.items()) / images
    least = TOKENIZER_STEPS * TOKENIZER_BATCH * per_image / 3600
    most = least / UTILIZATION
    training = (
        f"training is {least:,.0f} A100-hours, the arithmetic of 1 M steps at the data sheet's peak, to "
        f"{most:,.0f} at {UTILIZATION:.0%} of it"
    )

    def row(claim: str, published: str, seconds: float, device: str, measured: Measured | None) -> Row:
        hours = TRAINED_IMAGES * seconds / 3600
        return Row(
            claim=f"{claim}, share of scoring in scoring and training",
            unit="%",
            published=published,
            estimated=(100 * hours / (hours + most), 100 * hours / (hours + least)),
            measured=measured,
            explanation=f"Scoring is {hours:,.0f} hours of {device}, {seconds:.3g} s per image; {training}. "
            f"Hours of {device} and of an A100, added as they are."
            + (" The published share comes without its arithmetic." if published else ""),
        )

    rows = [row("describing and scoring 380 M images", "< 1", SECONDS_PER_IMAGE, "an H100", None)]
    for name, scope in SCORERS.items():
        found = _seconds(name, scope, results)
        rows.append(row(f"scoring 380 M {scope}s with `{name}`", "", found.value, "a CPU core", found))
    return rows


def second_rows(results: Results) -> list[Row]:
    """Return the published seconds of scoring an image, next to those of our scorers."""
    _, content = results.read("scoring", "published_seconds")
    rows = [
        Row(
            claim=f"scoring an image, {name}",
            unit="s per image",
            published=seconds,
            measured=_seconds("accurate", "caption", results),
            explanation="Published on a GPU, and with the description unless by an LLM alone; ours scores a "
            "given caption.",
        )
        for name, seconds in content["published_seconds"].items()
    ]
    return [
        *rows,
        Row(
            claim="scoring an image without a caption",
            unit="s per image",
            published="",
            measured=_seconds("jpeg", "image", results),
            explanation="From the size of the decoded image as JPEG, at a lower correlation.",
        ),
    ]


def _seconds(name: str, scope: str, results: Results) -> Measured:
    return results.measured(
        "scoring", f"scorers/{name}/seconds", unit=f"s per {scope}", of=f"`{name}` scorer on one CPU core"
    )
