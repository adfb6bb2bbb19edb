"""Images written by background threads, so that the next ones can be drawn meanwhile."""

import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image

from cat_fast.data.files import atomic_write
from cat_fast.errors import UserError

MAX_THREADS = 8
_ENDS = {
    ".png": (b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB\x60\x82"),
    ".jpg": (b"\xff\xd8\xff", b"\xff\xd9"),
    ".webp": (b"RIFF", b""),
}
"""First and last bytes of image files, by suffix."""


class ImageWriter:
    """Writer of image files in the background, with a bounded number of images in memory.

    A context manager: leaving it waits for all files. An error of a file is raised by a later `write`, or on
    leaving.

    Args:
        threads: by default one per core, at most 8; encoding releases the interpreter's lock.
    """

    def __init__(self, threads: int | None = None) -> None:
        threads = threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))
        self.capacity = 4 * threads
        """Number of images that may wait; `write` blocks beyond it."""
        self._free = threading.Semaphore(self.capacity)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="images")
        self._pending: deque[Future[None]] = deque()

    def write(self, path: Path, image: Image.Image, **options: Any) -> None:
        """Write an image atomically, soon; `options` are those of `Image.save`.

        Raises:
            UserError: an earlier file cannot be written.
        """
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        self._free.acquire()
        self._pending.append(self._threads.submit(self._write, path, image, options))

    def _write(self, path: Path, image: Image.Image, options: dict[str, Any]) -> None:
        try:
            with atomic_write(path) as part:
                image.save(part, **options)
        except ValueError as error:  # such as an image too large for its format
            raise UserError(f"{path}: {error}") from error
        finally:
            self._free.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True)
        if error is None:
            for write in self._pending:
                write.result()


def is_complete_image(path: Path) -> bool:
    """Check that a PNG, JPEG or WebP file exists, and is neither empty nor cut: its ends are there."""
    start, end = _ENDS[path.suffix]
    try:
        with path.open("rb") as file:
            if file.read(len(start)) != start:
                return False
            if path.suffix == ".webp":  # its length is in the header, its last bytes are image data
                return 8 + int.from_bytes(file.read(4), "little") == os.fstat(file.fileno()).st_size
            file.seek(-len(end), os.SEEK_END)
            return file.read() == end
    except OSError:
        return False
