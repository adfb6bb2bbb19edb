"""Crops that workers decode into shared memory."""

from collections.abc import Callable

from cat_fast.data.images.size import height_and_width
from cat_fast.data.streams.buffers import Sample
from cat_fast.data.streams.decoding import Crop, CropSettings, SharedCrop, decode_crop, decode_crop_into
from cat_fast.data.streams.pool import Task, TaskFailure, WorkerPool
from cat_fast.data.streams.shared_slots import SharedSlots, Slot


class CropTask:
    """The crop of a sample, which may be in the works."""

    def __init__(self, sample: Sample, task: Task) -> None:
        self.sample, self.task = sample, task

    def result(self) -> Crop | TaskFailure:
        """Wait for the crop. Its pixels are valid until `release`."""
        found: Crop | TaskFailure = self.task.result()
        return found

    def release(self) -> None:
        """Give up the pixels."""


class SharedCropTask(CropTask):
    """A crop for whose pixels a slot is reserved.

    Args:
        on_crash: called if the slot cannot be given back.
    """

    def __init__(
        self,
        sample: Sample,
        task: Task,
        slots: SharedSlots,
        slot: Slot,
        on_crash: Callable[[SharedSlots], None],
    ) -> None:
        super().__init__(sample, task)
        self._slots, self._slot, self._on_crash = slots, slot, on_crash

    def result(self) -> Crop | TaskFailure:
        """Wait for the crop. Its pixels are valid until `release`."""
        found: Crop | SharedCrop | TaskFailure = self.task.result()
        if isinstance(found, SharedCrop):
            return Crop(self._slots.array(self._slot, found.shape, found.dtype), found.seconds)
        return found

    def release(self) -> None:
        """Give up the pixels and the slot, except after a crash: a dying process may still write to it."""
        if self.task.repeated:
            self._on_crash(self._slots)
        else:
            self._slots.release(self._slot)


class CropWorkers:
    """Decoding of crops by the processes of a pool.

    Args:
        count: number of crops whose pixels can be in shared memory at a time; those of more are sent through
            pipes.
    """

    def __init__(self, pool: WorkerPool, settings: CropSettings, count: int) -> None:
        self._pool, self._settings, self._count = pool, settings, count if pool.workers else 0
        height, width = height_and_width(settings.image_size)
        self._size = 3 * height * width * (4 if settings.colour_jitter else 1)
        self.slots = SharedSlots(self._size, self._count)

    def submit(self, sample: Sample, seed: tuple[int, ...]) -> CropTask:
        """Start the crop of a sample."""
        arguments = sample.data, seed, sample.allow_flip, self._settings
        slot = self.slots.take()
        if slot is None:
            return CropTask(sample, self._pool.submit(decode_crop, *arguments))
        task = self._pool.submit(decode_crop_into, slot, *arguments)
        return SharedCropTask(sample, task, self.slots, slot, self._replace)

    def _replace(self, crashed: SharedSlots) -> None:
        """Use new memory after a crash, which interrupts most tasks in flight."""
        if self.slots is crashed:
            self.slots = SharedSlots(self._size, self._count)
