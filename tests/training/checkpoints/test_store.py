"""Checkpoints are atomic: complete or absent, whatever fails while one is written."""

import errno
import json
import os
import signal
import threading

import pytest

from cat_fast.errors import UserError
from cat_fast.training.checkpoints import store as checkpoint
from cat_fast.training.checkpoints.store import MANIFEST, CheckpointStore, find_damage, seal
from cat_fast.training.runtime.ranks import Ranks


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", Ranks(), keep_last=2)


def write_some(value):
    def write(folder):
        (folder / "weights.bin").write_bytes(bytes([value]) * 100)
        (folder / "inner").mkdir()
        (folder / "inner" / "state.json").write_text(json.dumps({"value": value}))

    return write


def test_the_newest_checkpoint_is_found_and_only_the_last_ones_are_kept(store):
    assert store.latest() is None
    for step in (1, 2, 3):
        store.save(step, write_some(step))
    store.wait()
    assert store.latest() == (3, store.folder / "step_00000003")
    assert sorted(p.name for p in store.folder.iterdir()) == ["step_00000002", "step_00000003"]


def flip_one_bit(path):
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "weights.bin").write_bytes(b"short"), "expected 100 bytes, got 5"),
        (lambda f: (f / "weights.bin").write_bytes(b"x" * 100), "does not match its checksum"),
        (lambda f: flip_one_bit(f / "weights.bin"), "does not match its checksum"),
        (lambda f: (f / "inner" / "state.json").unlink(), "json is missing"),
        (lambda f: (f / MANIFEST).unlink(), "manifest is missing or invalid"),
        (lambda f: (f / MANIFEST).write_text('{"files": '), "manifest is missing or invalid"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_the_reason(store, damage, message):
    store.save(1, write_some(1))
    store.save(2, write_some(2))
    store.wait()
    damage(store.folder / "step_00000002")
    with pytest.warns(UserWarning, match=message):
        assert store.latest() == (1, store.folder / "step_00000001")


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_checkpoints_do_not_count_towards_keep_last(tmp_path, keep):
    store = CheckpointStore(tmp_path / "checkpoints", Ranks(), keep_last=3)
    for step in (5, 6, 7):
        store.save(step, write_some(step))
        store.wait()
    for step in (6, 7):
        flip_one_bit(store.folder / f"step_{step:08d}" / "weights.bin")
    store.keep_last = keep
    with pytest.warns(UserWarning, match="skipping damaged checkpoint"):
        assert store.latest() == (5, store.folder / "step_00000005")
    store.save(6, write_some(6))
    store.wait()
    assert store.latest() == (6, store.folder / "step_00000006")
    left = sorted(path.name for path in store.folder.glob("step_*"))
    assert left == ["step_00000005", "step_00000006"][-keep:]


def test_without_a_valid_checkpoint_the_run_does_not_silently_start_over(store):
    for step in (1, 2):
        store.save(step, write_some(step))
        store.wait()
        flip_one_bit(store.folder / f"step_{step:08d}" / "weights.bin")
    with pytest.raises(UserError, match=r"none of its 2 checkpoints is valid.*checkpoint\.resume=never"):
        store.latest()
    assert len(list(store.folder.glob("step_*"))) == 2


def test_other_folders_next_to_checkpoints_are_left_alone(store):
    store.save(1, write_some(1))
    store.wait()
    (store.folder / "step_00000012_backup").mkdir()
    assert store.latest() == (1, store.folder / "step_00000001")
    for step in (2, 3, 4):
        store.save(step, write_some(step))
    store.wait()
    assert (store.folder / "step_00000012_backup").is_dir()


def test_a_failure_while_writing_leaves_the_previous_checkpoint(store):
    store.save(1, write_some(1))
    store.wait()

    def die(folder):
        write_some(2)(folder)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        store.save(2, die)
    assert store.latest() == (1, store.folder / "step_00000001")
    store.save(2, write_some(3))
    store.wait()
    assert store.latest() == (2, store.folder / "step_00000002")
    assert json.loads((store.folder / "step_00000002/inner/state.json").read_text()) == {"value": 3}
    assert find_damage(store.folder / "step_00000002") is None
    assert not list(store.folder.glob(".*"))


def test_training_continues_while_a_checkpoint_is_sealed_and_only_one_is_sealed_at_a_time(store, monkeypatch):
    may_continue, sealing = threading.Event(), []

    def slow(folder):
        sealing.append(folder.name)
        assert may_continue.wait(10)
        seal(folder)

    monkeypatch.setattr(checkpoint, "seal", slow)
    store.save(1, write_some(1))
    assert store.latest() is None  # `save` has returned, but nothing is sealed yet
    second = threading.Thread(target=store.save, args=(2, write_some(2)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert sealing == [".step_00000001.part"]
    may_continue.set()
    second.join(10)
    store.wait()
    assert store.latest() == (2, store.folder / "step_00000002")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "PytorchStreamWriter failed"),
    ],
)
def test_a_failed_write_raises_a_one_line_error_and_leaves_no_partial_checkpoint(store, error, reason):
    store.save(1, write_some(1))

    def fail(folder):
        write_some(2)(folder)
        raise error

    with pytest.raises(UserError, match=rf"{store.folder}: a checkpoint cannot be written \({reason}"):
        store.save(2, fail)
    assert [p.name for p in store.folder.iterdir()] == ["step_00000001"]
    assert find_damage(store.folder / "step_00000001") is None


def test_a_failure_to_seal_is_visible_at_once_and_raised_by_the_next_wait(store, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    store.save(1, write_some(1))
    store.wait()
    monkeypatch.setattr(checkpoint, "seal", full)
    store.save(2, write_some(2))
    store.join()
    assert "the disk is full" in str(store.failure)
    with pytest.raises(UserError, match="the disk is full"):
        store.save(3, write_some(3))
    assert [p.name for p in store.folder.iterdir()] == ["step_00000001"]


def test_a_write_that_the_kernel_refuses_counts_as_a_full_disk(store):
    """Run in a child process whose files are limited to 1000 bytes."""
    import resource

    store.save(1, write_some(1))
    store.wait()

    def outgrow():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(UserError, match="the disk is full"):
            store.save(2, lambda folder: (folder / "weights").write_bytes(b"x" * 5000) and None)

    assert in_child(outgrow) == 0
    assert [p.name for p in store.folder.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize(
    ("moment", "left"), [("write", 1), ("_fsync", 1), ("sha256", 1), ("rename", 1), ("_prune", 2)]
)
def test_a_process_killed_at_any_moment_leaves_a_complete_checkpoint(store, moment, left):
    store.save(1, write_some(1))
    store.wait()

    def die(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    def killed():
        for owner in (checkpoint, checkpoint.Path, CheckpointStore):
            if hasattr(owner, moment):
                setattr(owner, moment, die)
        store.save(2, die if moment == "write" else write_some(2))
        store.wait()

    assert in_child(killed) == -signal.SIGKILL
    assert store.latest() == (left, store.folder / f"step_{left:08d}")
    store.save(3, write_some(3))
    store.wait()
    assert store.latest() == (3, store.folder / "step_00000003")
    assert not list(store.folder.glob(".*"))


def in_child(action) -> int:
    """Run `action` in a forked process; return 0, 1 after an exception, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
