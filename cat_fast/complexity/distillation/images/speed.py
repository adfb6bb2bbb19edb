"""CPU time of the image student per image, with reading a JPEG."""

import io
import time
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
_REPEATS = 3


def measure_speed(student: ImageStudent) -> dict[str, Any]:
    """Return the CPU seconds per image on one thread, decoding included, and what two cores reach with it.

    Images are packaged photographs as JPEGs with a long side of `LONG_SIDE` px. Two processes, such as
    `--shard 0/2` and `1/2`, share no work, so that two cores score twice as many images.
    """
    files = [_as_jpeg(load_image(photo.path)) for photo in photographs()[:_IMAGES]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _score(student, files[0])  # the first call allocates
        times = []
        for _ in range(_REPEATS):
            start = time.process_time()
            for file in files:
                _score(student, file)
            times.append((time.process_time() - start) / len(files))
    finally:
        torch.set_num_threads(threads)
    seconds = min(times)  # other processes on the machine only slow it down
    return {
        "cpu_seconds_per_image": round(seconds, 5),
        "images_per_second_on_two_cores": round(2 / seconds, 1),
        "long_side": LONG_SIDE,
        "processor": processor_name(),
    }


def _as_jpeg(image: Image.Image) -> bytes:
    scale = LONG_SIDE / max(image.size)
    width, height = (max(round(side * scale), 1) for side in image.size)
    file = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _score(student: ImageStudent, file: bytes) -> None:
    student.score_images([student.prepare(decode_image(file))])
