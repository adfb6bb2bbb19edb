"""Scorers of images by the names of the command line; each is imported only when it is used."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat_fast.complexity.captioners.base import Captioner
from cat_fast.complexity.image_score import ImageScorer
from cat_fast.complexity.ratios.jpeg_thresholds import JPEG_THRESHOLDS, JpegThresholds
from cat_fast.complexity.score import Scorer
from cat_fast.errors import UserError

CAPTIONERS = ("detectors", "vlm", "endpoint")
PIXEL_SCORERS = ("image_student", "jpeg")
"""Scorers of images that read no description."""
UNIFIED = "unified"
IMAGE_SCORERS = (*PIXEL_SCORERS, UNIFIED)
DEFAULT_IMAGE_SCORER = "image_student"
"""Scorer of images without captions where no other is chosen."""

_OPTIONS: dict[str, tuple[str, ...]] = {
    "detectors": (),
    "vlm": ("model", "questions", "template", "device", "batch_size"),
    "endpoint": ("model", "base_url", "questions", "batch_size"),
}
"""Options that each captioner uses."""


@dataclass(frozen=True, kw_only=True)
class CaptionerOptions:
    """Options of a captioner; None if not given."""

    model: str | None = None
    """Name or folder of the vision-language model, or its name at the endpoint."""
    base_url: str | None = None
    """URL of the endpoint."""
    questions: str | None = None
    """"short" or "long" for the caption prompt of the default questions, or a file (`QuestionSet.read`)."""
    template: str | None = None
    """Prompt of a model without a chat template."""
    batch_size: int | None = None
    """Images per forward pass, or concurrent requests."""
    device: str | None = None
    """Device of a model in this process; shared with a language model that scores."""
    api_key_env: str | None = None
    """Environment variable with the key of the endpoint; shared likewise."""
    timeout: float | None = None
    """Seconds per request to the endpoint; disables retries."""

    def given(self) -> dict[str, Any]:
        """Return the options of a captioner alone that are given."""
        names = ("model", "base_url", "questions", "template", "batch_size")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def reads_images(scorer: str | None, captioner: str | None) -> bool:
    """Return whether a scorer or a captioner by these names reads images rather than captions."""
    return captioner is not None or scorer in IMAGE_SCORERS


def by_pixels(jpeg: JpegThresholds | None) -> dict[str, Any]:
    """Return the arguments of `RatioPolicy` for images without labels: JPEG thresholds, or the student."""
    if jpeg is not None:
        return {"jpeg": jpeg}
    from cat_fast.complexity.image_scorers.student.scorer import image_student

    return {"pixels": image_student()}


def load_image_scorer(
    captioner: str | None,
    scorer: str | None,
    load_text_scorer: Callable[[], Scorer],
    options: CaptionerOptions = CaptionerOptions(),  # immutable
    jpeg_thresholds: JpegThresholds | None = None,
) -> ImageScorer:
    """Return a scorer of images, loaded.

    Args:
        captioner: one of `CAPTIONERS`; None for a scorer of pixels.
        scorer: one of `IMAGE_SCORERS`, or with a captioner None or the name of a scorer of descriptions.
        load_text_scorer: loads the scorer of descriptions.
        options: options of the captioner.
        jpeg_thresholds: thresholds of the scorer `jpeg`.

    Raises:
        UserError: an option is missing or not used, or a model cannot be loaded.
    """
    if jpeg_thresholds is not None and scorer != "jpeg":
        raise UserError("--jpeg-thresholds: applies to --scorer jpeg")
    if captioner is None:
        if scorer == UNIFIED:
            raise UserError(
                f"--scorer {UNIFIED}: --captioner is missing; name the model that describes and scores with"
                " --captioner vlm or endpoint"
            )
        _require_no_options(options)
        return _load_pixels(scorer or DEFAULT_IMAGE_SCORER, jpeg_thresholds or JPEG_THRESHOLDS)
    _require_known(captioner)
    if scorer in PIXEL_SCORERS:
        raise UserError(
            f"--captioner {captioner}: --scorer {scorer} reads no description; leave one of them out"
        )
    _check_options(captioner, options)
    if scorer == UNIFIED:
        if captioner == "detectors":
            raise UserError(f"--scorer {UNIFIED}: expected --captioner vlm or endpoint, got detectors")
        if options.questions is not None:
            raise UserError(f"--questions: --scorer {UNIFIED} asks everything in one prompt; leave it out")
        from cat_fast.complexity.captioners.unified import UnifiedScorer

        return UnifiedScorer(_load_vision(captioner, options))
    from cat_fast.complexity.image_scorers.captioned import CaptionedScorer

    text_scorer = load_text_scorer()
    return CaptionedScorer(_load_captioner(captioner, options), text_scorer)


def load_captioner(name: str | None, options: CaptionerOptions) -> Captioner | None:
    """Return a captioner, one of `CAPTIONERS`, loaded; None without a name.

    Raises:
        UserError: the name is unknown, an option is missing or not used, or the model cannot be loaded.
    """
    if name is None:
        _require_no_options(options)
        return None
    _require_known(name)
    _check_options(name, options)
    return _load_captioner(name, options)


def _load_pixels(name: str, jpeg_thresholds: JpegThresholds) -> ImageScorer:
    if name == "image_student":
        from cat_fast.complexity.image_scorers.student.scorer import image_student

        return image_student()
    from cat_fast.complexity.image_scorers.jpeg import JpegScorer

    return JpegScorer(jpeg_thresholds)


def _require_known(captioner: str) -> None:
    if captioner not in CAPTIONERS:
        raise UserError(f"--captioner {captioner}: expected one of {', '.join(CAPTIONERS)}")


def _require_no_options(options: CaptionerOptions) -> None:
    if unused := [*options.given()]:
        raise UserError(f"{flag_of(unused[0])}: applies to --captioner vlm or endpoint")


def _check_options(captioner: str, options: CaptionerOptions) -> None:
    given = options.given()
    if unused := [name for name in given if name not in _OPTIONS[captioner]]:
        users = [name for name in CAPTIONERS if unused[0] in _OPTIONS[name]]
        raise UserError(
            f"{flag_of(unused[0])}: not used by --captioner {captioner}; leave it out, or choose"
            f" {' or '.join(users)}"
        )
    for name, example in (("model", "llava-hf/llava-1.5-7b-hf"), ("base_url", "http://localhost:8000/v1")):
        if name in _OPTIONS[captioner] and name not in given:
            raise UserError(
                f"--captioner {captioner}: {flag_of(name)} is missing; pass it, such as {example}"
            )


def _load_captioner(name: str, options: CaptionerOptions) -> Captioner:
    if name == "detectors":
        from cat_fast.complexity.captioners.detectors import Detectors

        return Detectors()
    from cat_fast.complexity.captioners.model_captioner import ModelCaptioner
    from cat_fast.complexity.captioners.questions import QuestionSet

    match options.questions:
        case None | "short":
            questions = QuestionSet()
        case "long":
            questions = QuestionSet.long()
        case file:
            questions = QuestionSet.read(Path(file))
    return ModelCaptioner(_load_vision(name, options), questions)


def _load_vision(name: str, options: CaptionerOptions) -> Any:
    assert options.model is not None  # checked before
    given: dict[str, Any] = {}
    if name == "vlm":
        from cat_fast.complexity.captioners.transformers_vision import TransformersVision

        if options.batch_size is not None:
            given["batch_size"] = options.batch_size
        return TransformersVision(options.model, device=options.device, template=options.template, **given)
    from cat_fast.complexity.captioners.endpoint_vision import EndpointVision

    if options.batch_size is not None:
        given["concurrency"] = options.batch_size
    if options.api_key_env is not None:
        given["api_key_env"] = options.api_key_env
    if options.timeout is not None:
        given |= {"timeout": options.timeout, "retries": 0}
    return EndpointVision(options.model, options.base_url or "", **given)


def flag_of(option: str) -> str:
    """Return the option of the command line for a field of `CaptionerOptions`."""
    return {"base_url": "--captioner-url", "questions": "--questions"}.get(
        option, f"--captioner-{option.replace('_', '-')}"
    )
