"""How a stream of images is read."""

from dataclasses import dataclass

from cat_fast.errors import UserError

UNSCORED = ("skip", "jpeg")
UNREADABLE = ("skip", "stop")


@dataclass(kw_only=True)
class StreamConfig:
    """Reading, shuffling and decoding of images that are not held in memory; all figures are a rank's."""

    workers: int = 4
    """Processes that decode; 0 decodes in the training process. Batches do not depend on it."""
    prefetch_steps: int = 2
    """How many steps ahead images are given to the workers."""
    shuffle_images: int = 1024
    """Images are shuffled among as many of the same ratio; two such buffers a ratio are held, encoded."""
    shuffle_megabytes: int = 256
    """A buffer ends at this size if it comes first, which bounds the memory."""
    unscored: str = "skip"
    """What becomes of images without score or ratio: `skip` passes them over and counts them, `jpeg` judges
    them by their size as a JPEG, which decodes them once more."""
    unreadable: str = "skip"
    """Whether a shard that cannot be opened is passed over (`skip`) or ends the run (`stop`)."""
    attempts: int = 5
    """How often a shard is tried before it counts as unreadable."""
    first_wait: float = 1.0
    """Seconds before the second attempt; each further wait is twice as long, up to a minute."""
    scratch: str = ""
    """Folder for the copies of remote shards, two a ratio at most; empty takes the system's temporary one."""

    def __post_init__(self) -> None:
        for name in ("workers", "prefetch_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"data.stream.{name}: {getattr(self, name)} is negative")
        for name in ("shuffle_images", "shuffle_megabytes", "attempts"):
            if getattr(self, name) < 1:
                raise UserError(f"data.stream.{name}: {getattr(self, name)} must be positive")
        if self.first_wait < 0:
            raise UserError(f"data.stream.first_wait: {self.first_wait} is negative")
        if self.unscored not in UNSCORED:
            raise UserError(f"data.stream.unscored: {self.unscored!r} is not {' or '.join(UNSCORED)}")
        if self.unreadable not in UNREADABLE:
            raise UserError(f"data.stream.unreadable: {self.unreadable!r} is not {' or '.join(UNREADABLE)}")
