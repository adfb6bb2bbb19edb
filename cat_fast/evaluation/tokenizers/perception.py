"""OCR and face detection in worker processes, next to the tokenizer."""

import os
import pickle
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
from PIL import Image

from cat_fast.errors import UserError, one_line
from cat_fast.evaluation.tokenizers import faces, text
from cat_fast.processes.worker import initialize


class Perceived(NamedTuple):
    """Words and faces of an image; None if they were not looked for."""

    words: list[text.Word] | None
    faces: list[faces.Box] | None


class Perception:
    """Finds words and faces in images on `workers` processes, each with one thread.

    Args:
        ocr, detect: what to look for.

    Raises:
        UserError: Tesseract or OpenCV is missing.
    """

    def __init__(self, ocr: bool, detect: bool, workers: int = 2) -> None:
        self.ocr, self.detect = ocr, detect
        self.versions: dict[str, str] = {}
        if ocr:
            self.versions["tesseract"] = text.require_tesseract()
        if detect:
            self.versions["opencv"] = faces.require_detector()
        call = pickle.dumps((_limit_threads, ()))
        self._pool = (
            ProcessPoolExecutor(workers, get_context("spawn"), initialize, (call,)) if ocr or detect else None
        )

    def submit(self, pixels: np.ndarray) -> "Future[Perceived] | None":
        """Start on an image (H, W, 3) uint8; return None if there is nothing to look for."""
        if self._pool is None:
            return None
        return self._pool.submit(perceive, pixels, self.ocr, self.detect)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@contextmanager
def perception(ocr: bool, detect: bool, workers: int) -> Iterator[Perception]:
    """Yield a `Perception` whose processes end with the context."""
    found = Perception(ocr, detect, workers)
    try:
        yield found
    finally:
        found.close()


def perceive(pixels: np.ndarray, ocr: bool, detect: bool) -> Perceived:
    """Return the words and faces of an image (H, W, 3) uint8."""
    image = Image.fromarray(pixels)
    return Perceived(text.read_words(image) if ocr else None, faces.find_faces(image) if detect else None)


def result_of(future: "Future[Perceived] | None") -> Perceived:
    """Return what a process found.

    Raises:
        UserError: OCR or detection failed.
    """
    if future is None:
        return Perceived(None, None)
    try:
        return future.result()
    except Exception as error:  # of Tesseract, of OpenCV, of a dead process
        raise UserError(f"OCR or face detection failed ({one_line(error)[:200]})") from error


def _limit_threads() -> None:
    """Give every process one thread: there are as many processes as cores."""
    os.environ["OMP_THREAD_LIMIT"] = "1"  # read by Tesseract, which otherwise starts four threads
    try:
        import cv2

        cv2.setNumThreads(1)
    except ImportError:
        return
