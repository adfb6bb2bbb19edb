"""Crops that workers decode into shared memory."""

import logging
from collections.abc import Callable

from cat_fast.data.images.size import height_and_width
from cat_fast.data.streams.buffers import Sample
from cat_fast.data.streams.decoding import Crop, CropSettings, SharedCrop, decode_crop, decode_crop_into
from cat_fast.data.streams.pool import Task, TaskFailure, WorkerPool
from cat_fast.data.streams.shared_slots import SharedSlots, Slot

_LOG = logging.getLogger("cat_fast.data")
_LEAST_BYTES = 256 << 10
"""Least size of a slot, for the encoded images of small crops; files larger than a slot use pipes."""


class CropTask:
    """The crop of a sample, which may be unfinished."""

    def __init__(self, sample: Sample, task: Task) -> None:
        self.sample, self.task = sample, task

    def result(self) -> Crop | TaskFailure:
        """Wait for the crop. Its pixels are valid until `release`."""
        found: Crop | TaskFailure = self.task.result()
        return found

    def release(self) -> None:
        """Give up the pixels."""


class SharedCropTask(CropTask):
    """A crop whose encoded image and pixels use the same slot, one after the other.

    Args:
        on_loss: called with `slots` if they must not be used any more, and whether others may be.
    """

    def __init__(
        self,
        sample: Sample,
        task: Task,
        slots: SharedSlots,
        slot: Slot,
        on_loss: Callable[[SharedSlots, bool], None],
    ) -> None:
        super().__init__(sample, task)
        self._slots, self._slot, self._on_loss = slots, slot, on_loss

    def result(self) -> Crop | TaskFailure:
        """Wait for the crop. Its pixels are valid until `release`."""
        found: Crop | SharedCrop | TaskFailure | None = self.task.result()
        if isinstance(found, SharedCrop):
            return Crop(self._slots.array(self._slot, found.shape, found.dtype), found.seconds)
        if found is None:  # the worker cannot map the memory
            self._on_loss(self._slots, False)
            function, arguments = self.task.again
            piped: Crop | TaskFailure = self.task.pool.submit(function, *arguments).result()
            return piped
        return found

    def release(self) -> None:
        """Give up the pixels and the slot, except after a crash: a dying process may still write to it."""
        if self.task.repeated:
            self._on_loss(self._slots, True)
        else:
            self._slots.release(self._slot)


class CropWorkers:
    """Decoding of crops by the processes of a pool.

    Args:
        count: number of crops that can be in shared memory at a time; more are sent through pipes.
    """

    def __init__(self, pool: WorkerPool, settings: CropSettings, count: int) -> None:
        self._pool, self._settings, self._count = pool, settings, count if pool.workers else 0
        height, width = height_and_width(settings.image_size)
        self._size = max(_LEAST_BYTES, 3 * height * width * (4 if settings.colour_jitter else 1))
        self.slots = SharedSlots(self._size, self._count)

    def submit(self, sample: Sample, seed: tuple[int, ...]) -> CropTask:
        """Start the crop of a sample."""
        settings = seed, sample.allow_flip, self._settings
        slot = self.slots.take()
        if slot is None:
            return CropTask(sample, self._pool.submit(decode_crop, sample.data, *settings))
        data: bytes | int = sample.data
        if len(sample.data) <= slot.size:
            self.slots.write(slot, sample.data)
            data = len(sample.data)
        task = self._pool.submit(decode_crop_into, slot, data, *settings)
        task.again = decode_crop, (sample.data, *settings)
        return SharedCropTask(sample, task, self.slots, slot, self._replace)

    def _replace(self, lost: SharedSlots, usable: bool) -> None:
        """Use other memory, as after a crash, which interrupts most tasks in flight; or none."""
        if self.slots is lost:
            if not usable:
                _LOG.warning(
                    "data: decoding processes cannot map shared memory; images are sent through pipes"
                )
            self.slots = SharedSlots(self._size, self._count if usable else 0)
