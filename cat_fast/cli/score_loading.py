"""The scorer that the options of `cat-fast score` describe, of captions or of images."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from cat_fast.errors import UserError

if TYPE_CHECKING:
    from cat_fast.complexity.image_score import ImageScorer
    from cat_fast.complexity.score import Scorer

_OF_CAPTIONS = ("model", "base_url", "prompt_file", "batch_size", "escalate", "escalate_to")
"""Options of scorers of captions, which scorers of pixels do not use."""


def load_chosen(
    scorer: str | None, captioner: str | None, options: Mapping[str, Any], *, images: bool
) -> "Scorer | ImageScorer":
    """Return the scorer of captions, or of images.

    Args:
        scorer, captioner: names; None if not given.
        options: all other options by their names, None if not given.

    Raises:
        UserError: an option is missing or not used, or the scorer cannot be loaded.
    """
    from cat_fast.complexity import JpegThresholds
    from cat_fast.complexity.image_scorers.loading import (
        DEFAULT_IMAGE_SCORER,
        UNIFIED,
        CaptionerOptions,
        flag_of,
        load_image_scorer,
    )
    from cat_fast.complexity.scorers.loading import DEFAULT_SCORER, load_scorer

    device, key = options["device"], options["api_key_env"]
    of_captioner = CaptionerOptions(
        model=options["captioner_model"],
        base_url=options["captioner_url"],
        questions=options["questions"],
        template=options["captioner_template"],
        batch_size=options["captioner_batch_size"],
        device=None if device == "auto" else device,
        api_key_env=key,
    )
    language_model = scorer if options["escalate"] is None else options["escalate_to"] or "llm"
    load_text_scorer = partial(
        load_scorer,
        scorer or DEFAULT_SCORER,
        # A captioner in the same place uses these, too; the scorer alone would refuse them.
        device=device if captioner != "vlm" or language_model == "llm" else None,
        api_key_env=key if captioner != "endpoint" or language_model in ("endpoint", "gguf") else None,
        **{name: options[name] for name in _OF_CAPTIONS},
    )
    sizes = options["jpeg_thresholds"]
    if not images:
        unused = {flag_of(name): value for name, value in of_captioner.given().items()}
        _require_unused(
            f"{scorer or DEFAULT_SCORER} without --captioner", unused | {"--jpeg-thresholds": sizes}
        )
        return load_text_scorer()
    if captioner is None or scorer == UNIFIED:
        unused = {f"--{name.replace('_', '-')}": options[name] for name in _OF_CAPTIONS}
        unused["--device"] = of_captioner.device if captioner != "vlm" else None
        unused["--api-key-env"] = key if captioner != "endpoint" else None
        unused |= {
            "--has-text/--no-text": options["has_text"],
            "--has-faces/--no-faces": options["has_faces"],
        }
        _require_unused(scorer or DEFAULT_IMAGE_SCORER, unused)
    thresholds = JpegThresholds.parse(sizes) if sizes is not None else None
    return load_image_scorer(captioner, scorer, load_text_scorer, of_captioner, thresholds)


def _require_unused(scorer: str, options: Mapping[str, Any]) -> None:
    """Raise UserError if an option is given that a scorer does not use."""
    if given := [name for name, value in options.items() if value is not None]:
        raise UserError(f"{given[0]}: not used by --scorer {scorer}; leave it out")
