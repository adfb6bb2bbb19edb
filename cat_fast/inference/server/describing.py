"""Descriptions of uploaded images: what the client sent, completed by a captioner."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from PIL import Image

from cat_fast.complexity import Description, default_scorer
from cat_fast.complexity.captioners.base import Captioner, DescriptionFailure
from cat_fast.complexity.image_score import GivenLabels
from cat_fast.complexity.image_scorers.captioned import CaptionedScorer
from cat_fast.errors import UserError, one_line
from cat_fast.inference.server.limits import log_line

FAILED = "the captioner failed; the server's log has the reason"
STOPPING = "the server is stopping"


class UploadDescriber:
    """Completes the descriptions of uploads, from several threads.

    Args:
        captioner: None for none; descriptions are then those of the client.
        stopping: returns True while the server stops; nothing is then described.
    """

    def __init__(self, captioner: Captioner | None, stopping: Callable[[], bool]) -> None:
        self._captioned = None if captioner is None else CaptionedScorer(captioner, default_scorer())
        self._stopping = stopping
        alone = captioner is not None and not captioner.concurrent
        self._turn: AbstractContextManager[object] = threading.Lock() if alone else nullcontext()
        self._counting = threading.Lock()
        self.active = 0
        """Number of images that are with the captioner, or wait for it."""

    @property
    def captioner(self) -> str | None:
        """Name of the captioner, if it describes images that have no description."""
        captioned = self._captioned
        return captioned.captioner.name if captioned and captioned.captioner.writes_captions else None

    def describe(self, image: Image.Image, given: GivenLabels) -> tuple[Description | None, str | None]:
        """Return an image's description, None if it has none, and why the captioner added nothing, else None.

        The captioner adds the caption and the flags that are not given.

        Args:
            image: RGB.
            given: description and flags that the client sent.
        """
        known = Description(given.caption, given.has_text, given.has_faces) if given.caption else None
        captioned = self._captioned
        complete = known is not None and given.has_text is not None and given.has_faces is not None
        if captioned is None or complete or (known is None and not captioned.captioner.writes_captions):
            return known, None
        with self._counting:
            self.active += 1
        try:
            with self._turn:
                if self._stopping():
                    return known, STOPPING
                (found,) = captioned.describe([captioned.prepare(image)], [given])
        except UserError as error:
            found = DescriptionFailure(one_line(error))
        except Exception as error:  # libraries of models raise many types
            found = DescriptionFailure(f"{type(error).__name__}: {one_line(error)}")
        finally:
            with self._counting:
                self.active -= 1
        if isinstance(found, DescriptionFailure):
            log_line({"event": "captioner failed", "error": found.error})  # it may name internal addresses
            return known, FAILED
        return found, None
