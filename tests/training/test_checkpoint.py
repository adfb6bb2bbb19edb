"""Checkpoints are whole or not there."""

import json

import pytest

from cat_fast.training.checkpoint import MANIFEST, CheckpointStore, find_damage
from cat_fast.training.distributed import Ranks


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", Ranks(), keep_last=2)


def write_some(value):
    def write(folder):
        (folder / "weights.bin").write_bytes(bytes([value]) * 100)
        (folder / "inner").mkdir()
        (folder / "inner" / "state.json").write_text(json.dumps({"value": value}))

    return write


def test_the_newest_is_found_and_only_the_last_ones_are_kept(store):
    assert store.latest() is None
    for step in (1, 2, 3):
        store.save(step, write_some(step))
    assert store.latest() == (3, store.folder / "step_00000003")
    assert sorted(p.name for p in store.folder.iterdir()) == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "weights.bin").write_bytes(b"short"), "5 bytes, 100 were written"),
        (lambda f: (f / "weights.bin").write_bytes(b"x" * 100), "not have the contents"),
        (lambda f: (f / "inner" / "state.json").unlink(), "is missing"),
        (lambda f: (f / MANIFEST).unlink(), "no readable manifest"),
        (lambda f: (f / MANIFEST).write_text('{"files": '), "no readable manifest"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(store, damage, says):
    store.save(1, write_some(1))
    store.save(2, write_some(2))
    damage(store.folder / "step_00000002")
    with pytest.warns(UserWarning, match=says):
        assert store.latest() == (1, store.folder / "step_00000001")


def test_what_dies_while_writing_leaves_the_checkpoint_before_it(store):
    store.save(1, write_some(1))

    def die(folder):
        write_some(2)(folder)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        store.save(2, die)
    assert store.latest() == (1, store.folder / "step_00000001")
    store.save(2, write_some(3))
    assert store.latest() == (2, store.folder / "step_00000002")
    assert json.loads((store.folder / "step_00000002/inner/state.json").read_text()) == {"value": 3}
    assert find_damage(store.folder / "step_00000002") is None
    assert not list(store.folder.glob(".*"))
