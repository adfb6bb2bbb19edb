"""Configuration of an image stream (`data.stream`)."""

import math
from dataclasses import dataclass

from cat_fast.errors import UserError

UNSCORED = ("skip", "jpeg")
UNREADABLE = ("skip", "stop")


@dataclass(kw_only=True)
class StreamConfig:
    """Reading, shuffling and decoding of images that are not held in memory; all values are per rank."""

    workers: int = 4
    """Number of decoder processes; 0 decodes in the training process. Batches do not depend on it."""
    prefetch_steps: int = 2
    """Number of steps for which images are sent to the workers in advance."""
    shuffle_images: int = 1024
    """Shuffle buffer size per ratio, in encoded images; two buffers per ratio are held in memory."""
    shuffle_megabytes: int = 256
    """Maximum size of a shuffle buffer, whatever its number of images; bounds the memory."""
    unscored: str = "skip"
    """How to handle images without a score or ratio: `skip` skips and counts them, `jpeg` derives the ratio
    from their size as a JPEG, which decodes them a second time."""
    unreadable: str = "skip"
    """How to handle a shard that cannot be opened: `skip` it, or `stop` the run."""
    attempts: int = 5
    """Number of attempts before a shard counts as unreadable."""
    first_wait: float = 1.0
    """Seconds before the second attempt; each further wait doubles, up to a minute."""
    scratch: str = ""
    """Folder for copies of remote shards, at most two per ratio; empty uses the system's temporary folder."""

    def __post_init__(self) -> None:
        for name in ("workers", "prefetch_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"data.stream.{name}: {getattr(self, name)} is negative")
        for name in ("shuffle_images", "shuffle_megabytes", "attempts"):
            if getattr(self, name) < 1:
                raise UserError(f"data.stream.{name}: {getattr(self, name)} must be positive")
        if not 0 <= self.first_wait < math.inf:
            raise UserError(f"data.stream.first_wait: {self.first_wait} is negative or not finite")
        if self.unscored not in UNSCORED:
            raise UserError(f"data.stream.unscored: {self.unscored!r} is not {' or '.join(UNSCORED)}")
        if self.unreadable not in UNREADABLE:
            raise UserError(f"data.stream.unreadable: {self.unreadable!r} is not {' or '.join(UNREADABLE)}")
