"""Crops in shared memory: the same pixels, no slot used twice, no memory left."""

import contextlib
import gc
import os
import signal
import time
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest

from cat_fast.data.streams import crop_tasks
from cat_fast.data.streams.buffers import Position, Sample
from cat_fast.data.streams.crop_tasks import CropWorkers, SharedCropTask
from cat_fast.data.streams.decoding import CropSettings, SharedCrop, decode_crop, decode_crop_into
from cat_fast.data.streams.pool import TaskFailure, WorkerPool
from cat_fast.data.streams.shared_slots import SharedSlots
from tests.data.streams.sets import batches, image, make_source, tar_set, write_shards

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs anonymous memory of Linux")
SETTINGS = [CropSettings(8, 0.5), CropSettings((16, 8), 0.5, colour_jitter=0.2)]


def sample(number: int, data: bytes | None = None) -> Sample:
    return Sample(
        shard="s", number=number, key=str(number), data=image(number) if data is None else data,
        allow_flip=True, epoch=0, after=Position(),
    )  # fmt: skip


def expected(one: Sample, seed: tuple[int, ...], settings: CropSettings) -> np.ndarray:
    return decode_crop(one.data, seed, one.allow_flip, settings).pixels


@pytest.fixture
def pool():
    made = WorkerPool(2)
    yield made
    made.close()


@pytest.mark.parametrize("settings", SETTINGS)
def test_pixels_are_those_of_this_process_in_more_tasks_than_slots(pool, settings):
    workers = CropWorkers(pool, settings, 3)
    for _ in range(3):
        samples = [sample(n) for n in range(6)]
        tasks = [workers.submit(one, (n,)) for n, one in enumerate(samples)]
        assert [isinstance(task, SharedCropTask) for task in tasks] == [True] * 3 + [False] * 3
        assert workers.slots.free == 0
        for n, task in enumerate(tasks):
            crop = task.result()
            np.testing.assert_array_equal(crop.pixels, expected(samples[n], (n,), settings))
            assert crop.seconds > 0
            assert isinstance(task.task.result(), SharedCrop) == (n < 3)
        for task in tasks:
            task.release()
        assert workers.slots.free == 3


def test_a_broken_image_gives_its_slot_back(pool):
    workers = CropWorkers(pool, SETTINGS[0], 1)
    task = workers.submit(sample(0, b"not an image"), (0,))
    assert isinstance(task.result(), TaskFailure)
    task.release()
    assert workers.slots.free == 1


def test_a_slot_of_a_crashed_process_is_not_used_again(pool):
    workers = CropWorkers(pool, SETTINGS[0], 2)
    for _ in range(pool.workers):
        pool.submit(time.sleep, 60)
    task = workers.submit(sample(0), (0,))
    for process in list(pool._executor._processes):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    np.testing.assert_array_equal(task.result().pixels, expected(sample(0), (0,), SETTINGS[0]))
    before = workers.slots
    task.release()
    assert workers.slots is not before
    assert (before.free, workers.slots.free) == (1, 2)
    again = workers.submit(sample(1), (1,))
    np.testing.assert_array_equal(again.result().pixels, expected(sample(1), (1,), SETTINGS[0]))


def test_files_that_do_not_fit_are_sent_through_pipes(pool, monkeypatch):
    monkeypatch.setattr(crop_tasks, "_LEAST_BYTES", 0)
    workers = CropWorkers(pool, SETTINGS[0], 1)
    assert len(image(0)) > 3 * 8 * 8
    task = workers.submit(sample(0), (0,))
    np.testing.assert_array_equal(task.result().pixels, expected(sample(0), (0,), SETTINGS[0]))
    assert isinstance(task.task.result(), SharedCrop)


def test_crops_come_through_pipes_if_workers_cannot_map_the_memory(pool):
    workers = CropWorkers(pool, SETTINGS[0], 2)
    workers.slots._memory = workers.slots._memory._replace(owner=2**22 + 1)
    tasks = [workers.submit(sample(n), (n,)) for n in range(2)]
    for n, task in enumerate(tasks):
        np.testing.assert_array_equal(task.result().pixels, expected(sample(n), (n,), SETTINGS[0]))
        task.release()
    assert workers.slots.take() is None


def test_a_file_with_the_descriptor_of_closed_memory_is_not_touched(tmp_path):
    slots = SharedSlots(3 * 8 * 8, 1)
    slot = slots.take()
    path = tmp_path / "checkpoint"
    path.write_bytes(bytes(3 * 8 * 8))
    with path.open("r+b") as file:
        other = slot._replace(memory=slot.memory._replace(file=file.fileno()))
        assert decode_crop_into(other, image(0), (0,), True, SETTINGS[0]) is None
    assert decode_crop_into(slot, image(0), (0,), True, SETTINGS[0]) == SharedCrop((3, 8, 8), "|u1", ANY)
    assert not any(path.read_bytes())


def test_without_such_memory_crops_come_through_pipes(pool, monkeypatch):
    def refuse(name):
        raise PermissionError(name)

    monkeypatch.setattr(os, "memfd_create", refuse)
    task = CropWorkers(pool, SETTINGS[0], 2).submit(sample(0), (0,))
    np.testing.assert_array_equal(task.result().pixels, expected(sample(0), (0,), SETTINGS[0]))
    task.release()


def held() -> int:
    """Return how many mappings and descriptors of shared memory this process has."""
    found = Path("/proc/self/maps").read_text(encoding="utf-8").count("memfd:cat_fast")
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing
            found += "memfd:cat_fast" in os.readlink(path)
    return found


def test_memory_is_freed_with_its_source(tmp_path):
    folder = write_shards(tmp_path, [[8, 16, 32, 8, 16, 32]] * 2)
    gc.collect()
    before = held()
    source = make_source(tar_set(folder), workers=1)
    straight = batches(make_source(tar_set(folder)), range(12))
    assert batches(source, range(12)) == straight
    assert held() > before
    in_flight = sum(map(len, source._pending.values()))
    assert source._workers.slots.free == 2 * (source.config.prefetch_steps + 2) - in_flight
    source.close()
    del source
    gc.collect()
    assert held() == before
