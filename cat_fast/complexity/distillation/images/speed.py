"""CPU time of the image student per image, decoding of a JPEG included."""

import io
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from cat_fast.complexity.image_scorers.student.scorer import ImageStudent
from cat_fast.data.images.io import decode_image, load_image
from cat_fast.data.photographs import photographs
from cat_fast.processor import processor_name

LONG_SIDE = 500
_QUALITY = 90
_IMAGES = 24
_REPEATS = 5


def measure_speed(student: ImageStudent) -> dict[str, Any]:
    """Return the CPU seconds per image on one thread, decoding included, and twice its rate for two cores.

    Images are packaged photographs as JPEGs with a long side of `LONG_SIDE` px. Two processes, such as
    `--shard 0/2` and `1/2`, share no work, so that two cores score twice as many images. On a machine under
    load CPU seconds are too high; the ratio to decoding alone, measured in turns, is not.
    """
    files = [_as_jpeg(load_image(photo.path)) for photo in photographs()[:_IMAGES]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _score(student, files[0])  # the first call allocates
        scoring, decoding = [], []
        for _ in range(_REPEATS):
            scoring.append(_seconds(lambda file: _score(student, file), files))
            decoding.append(_seconds(decode_image, files))
    finally:
        torch.set_num_threads(threads)
    seconds = min(scoring)  # other processes on the machine only slow it down
    return {
        "cpu_seconds_per_image": round(seconds, 5),
        "images_per_second_on_two_cores": round(2 / seconds, 1),
        "decoding_cpu_seconds_per_image": round(min(decoding), 5),
        "times_decoding": round(statistics.median(a / b for a, b in zip(scoring, decoding, strict=True)), 2),
        "load_average": round(os.getloadavg()[0], 1),
        "long_side": LONG_SIDE,
        "processor": processor_name(),
    }


def _as_jpeg(image: Image.Image) -> bytes:
    scale = LONG_SIDE / max(image.size)
    width, height = (max(round(side * scale), 1) for side in image.size)
    file = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _seconds(call: Callable[[bytes], object], files: Sequence[bytes]) -> float:
    """Return the CPU seconds per file."""
    start = time.process_time()
    for file in files:
        call(file)
    return (time.process_time() - start) / len(files)


def _score(student: ImageStudent, file: bytes) -> None:
    student.score_images([student.prepare(decode_image(file))])
