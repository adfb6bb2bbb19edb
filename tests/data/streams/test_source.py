"""Streamed batches: identical after interruption, with any number of workers and with damaged data."""

import json
import logging
import re
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cat_fast.data.images.io import decode_image
from cat_fast.data.images.random_crop import random_crop
from cat_fast.data.streams import source as source_module
from cat_fast.data.streams.decoding import CropSettings, crop_seed
from cat_fast.data.streams.formats.base import Rating
from cat_fast.data.streams.formats.image_files import FolderShards, IndexShards
from cat_fast.data.streams.held_out import HeldOut, TrainingShards
from cat_fast.data.streams.source import StreamSource
from cat_fast.errors import UserError
from tests.data.streams.sets import batches, image, make_source, state_of, tar_set, write_shards

RATIOS = [[8, 16, 16, 32, 16, 32], [16, 8, 32, 16], [32, 16, 8, 16, 16, 32, 32, 8], [8, 16, 32]]
BROKEN = ("0-1", "1-0", "2-2", "3-2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write 21 images to four archives; four are broken, one or two of each ratio."""
    return write_shards(tmp_path_factory.mktemp("shards"), RATIOS, BROKEN)


@pytest.fixture(scope="module")
def straight(folder):
    """Return sixty batches of each of two ranks."""
    return [batches(make_source(tar_set(folder), rank=rank, world_size=2), range(60)) for rank in (0, 1)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    stops=st.lists(st.integers(0, 59), max_size=4).map(sorted),
    rank=st.sampled_from([0, 1]),
    prefetch=st.integers(0, 4),
)
def test_interruptions_do_not_change_the_batches(folder, straight, stops, rank, prefetch):
    found, step, states = [], 0, None
    for stop in [*stops, 60]:
        stream = make_source(tar_set(folder), rank=rank, world_size=2, prefetch_steps=prefetch)
        if states:
            stream.load_state_dict(states)
        found += batches(stream, range(step, stop))
        step, states = stop, [state_of(stream)] * 2
        stream.close()
    assert found == straight[rank]


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(folder, straight, workers):
    stream = make_source(tar_set(folder), world_size=2, workers=workers)
    found = batches(stream, range(25))
    state = state_of(stream)
    stream.close()
    again = make_source(tar_set(folder), world_size=2, workers=4 - workers)
    again.load_state_dict([state, state])
    found += batches(again, range(25, 50))
    again.close()
    assert found == straight[0][:50]


def test_ranks_together_read_all_images_of_each_ratio(straight):
    for ratio in (8, 16, 32):
        good = {
            f"shard-{s:06d}.tar: {s}-{n}"
            for s, fs in enumerate(RATIOS)
            for n, f in enumerate(fs)
            if f == ratio and f"{s}-{n}" not in BROKEN
        }
        by_rank = [
            [key.rpartition("/")[2] for f, keys, *_ in its for key in keys if f == ratio] for its in straight
        ]
        assert {key for keys in by_rank for key in keys} == good
    assert {ratio for its in straight for ratio, *_ in its} == {8, 16, 32}


def test_a_crop_is_a_function_of_seed_epoch_ratio_and_key(folder):
    stream = make_source(tar_set(folder), batch_size=3, shares={8: 1.0, 16: 1.0}, seed=7)
    used: Counter = Counter()
    for _ in range(30):
        batch = stream.batch()
        for key, pixels in zip(batch.keys, batch.images, strict=True):
            shard, number = map(int, re.findall(r"(\d+)-(\d+)$", key)[0])
            epoch = used[batch.ratio, key]
            used[batch.ratio, key] += 1
            rng = np.random.default_rng(crop_seed(7, epoch, batch.ratio, f"{shard}-{number}"))
            expected = random_crop(decode_image(image(100 * shard + number)), rng, 8, 0.5, allow_flip=True)
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(expected))
    assert {ratio for ratio, _ in used} == {8, 16}
    assert min(used.values()) > 2


def test_seeds_of_crops_differ_and_are_the_same_in_every_process():
    values = product((0, 1), (0, 1), (8, 16), ("a", "b"))
    assert len({crop_seed(*each) for each in values}) == 16
    assert crop_seed(3, 2, 16, "caf\udce9") == (3, 2, 16, 8851403707255205904, 5)


def test_crops_change_with_the_epoch_and_images_with_text_are_not_flipped(tmp_path):
    folder = write_shards(tmp_path, [[16]])
    whole = CropSettings(16, 1.0)  # full height of 20 x 16, at five offsets
    original = np.asarray(decode_image(image(0))).transpose(2, 0, 1)
    unflipped = {np.ascontiguousarray(original[:, :, x : x + 16]).tobytes() for x in range(5)}

    def crops() -> list[bytes]:
        stream = make_source(tar_set(folder), batch_size=1, shares={16: 1.0}, crop=whole)
        return [pixels for _, _, pixels, _ in batches(stream, range(40))]

    free = crops()
    assert len(set(free)) > 5
    assert 10 < sum(pixels in unflipped for pixels in free) < 30
    sidecar = next(folder.glob("*.scores.jsonl"))
    sidecar.write_text('{"key": "0-0", "ratio": 16, "has_text": true}\n')
    assert set(crops()) <= unflipped


def test_broken_images_are_skipped_counted_and_logged_and_batches_stay_full(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="cat_fast.data"):
        stream = make_source(tar_set(folder), shares={16: 1.0})
        found = batches(
            stream, range(9)
        )  # 18 images: more than two epochs of nine images, two of which are broken
    assert {len(keys) for _, keys, *_ in found} == {2}
    assert not any("0-1" in key for _, keys, *_ in found for key in keys)
    assert found[-1][3] >= 4
    assert "shard-000000.tar: 0-1 is skipped: not an image" in caplog.text


def test_images_without_a_ratio_are_skipped_or_rated_by_content(tmp_path, caplog):
    folder = write_shards(tmp_path, [[16] * 6])
    sidecar = next(folder.glob("*.scores.jsonl"))
    lines = sidecar.read_text().splitlines(keepends=True)
    sidecar.write_text("".join([*lines[:4], '{"key": "0-4", "score": 3}\n', "no line\n"]))
    skipping = make_source(tar_set(folder), shares={16: 1.0}, batch_size=4)
    first = skipping.batch()
    assert sorted(key[-3:] for key in first.keys) == ["0-0", "0-1", "0-2", "0-3"]
    assert first.skipped == 2
    assert "0-4 is skipped: it has neither score nor ratio" in caplog.text
    assert "line 6 is skipped" in caplog.text

    rating = make_source(
        tar_set(folder),
        shares={16: 1.0, 32: 1.0},
        batch_size=2,
        rating=Rating(lambda labels: labels.ratio, always_32),
        workers=1,
    )
    found = batches(rating, range(12))
    rating.close()
    by_ratio = {f: {key[-3:] for r, keys, *_ in found for key in keys if r == f} for f in (16, 32)}
    assert by_ratio == {16: {"0-0", "0-1", "0-2", "0-3"}, 32: {"0-4", "0-5"}}


def always_32(data: bytes) -> int:
    return 32


def test_without_rating_every_image_is_used_at_every_ratio(tmp_path):
    folder = write_shards(tmp_path, [[16, 8], [32]])
    for sidecar in folder.glob("*.jsonl"):
        sidecar.unlink()
    stream = make_source(tar_set(folder), rating=None, batch_size=3)
    found = batches(stream, range(20))
    for ratio in (8, 16, 32):
        drawn = [sorted(key[-3:] for key in keys) for f, keys, *_ in found if f == ratio]
        assert drawn
        assert all(keys == ["0-0", "0-1", "1-0"] for keys in drawn)  # one epoch per batch
    assert {skipped for *_, skipped in found} == {0}


def test_a_data_set_of_broken_images_raises_an_error_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "MAX_CONSECUTIVE_FAILURES", 10)
    folder = write_shards(tmp_path, [[16, 16, 16]], ["0-0", "0-1", "0-2"])
    with pytest.raises(
        UserError, match=r"10 images in a row cannot be decoded.*Check that the data set contains images"
    ):
        make_source(tar_set(folder), shares={16: 1.0}).batch()


@pytest.mark.parametrize("new_size", [1, 3, 6])
def test_on_another_number_of_ranks_the_epoch_resumes_without_finished_shards(tmp_path, new_size):
    ratios = [[16, 8] * 4 for _ in range(5)]
    folder = write_shards(tmp_path, ratios)
    same = {"seed": 3, "shares": {8: 1.0, 16: 1.0}}
    old = [make_source(tar_set(folder), rank=rank, world_size=2, **same) for rank in (0, 1)]
    before = {key for stream in old for f, keys, *_ in batches(stream, range(3)) if f == 16 for key in keys}
    states = [state_of(stream) for stream in old]
    finished = {
        shard
        for rank, state in enumerate(states)
        for shard in old[0].assignment.rank_shards(16, 0, rank).shards[: state["positions"]["16"][1]]
    }

    def resumed() -> list:
        new = [make_source(tar_set(folder), rank=r, world_size=new_size, **same) for r in range(new_size)]
        for stream in new:
            stream.load_state_dict(states)
        return new

    after = Counter()
    for stream in resumed():
        reader = stream._readers[16]
        while (pick := reader.pick()).epoch == 0:
            after[f"{pick.shard}: {pick.key}"] += 1
    assert set(after.values()) == {1}
    every = {f"{folder}/shard-{s:06d}.tar: {s}-{n}" for s in range(5) for n in range(0, 8, 2)}
    assert before | after.keys() == every
    assert not any(f"shard-{shard:06d}" in key for shard in finished for key in after)
    first, second = ([batches(stream, range(3, 11)) for stream in resumed()] for _ in range(2))
    assert first == second
    # Resuming from there is exact, too.
    stream = resumed()[0]
    batches(stream, range(3, 7))
    again = make_source(tar_set(folder), world_size=new_size, **same)
    again.load_state_dict([state_of(stream)] * new_size)
    assert batches(again, range(7, 11)) == first[0][4:]


@pytest.mark.parametrize("images", [2, 5, 12])
def test_with_another_shuffle_buffer_a_resumed_run_skips_no_image(tmp_path, images):
    shards = tar_set(write_shards(tmp_path, [[8] * 7, [8] * 5]))
    for stop in range(1, 12):
        before = make_source(shards, batch_size=1, shares={8: 1.0}, shuffle_images=3)
        keys = [key for _, (key,), *_ in batches(before, range(stop))]
        after = make_source(shards, batch_size=1, shares={8: 1.0}, shuffle_images=images)
        after.load_state_dict([state_of(before)])
        while after.state_dict()["positions"]["8"][0] == 0:  # the epoch
            keys += [key for _, (key,), *_ in batches(after, range(1))]
        assert len(set(keys)) == 12, (stop, keys)
        # and repeats those used of the buffer in progress; the next epoch may be in progress
        assert len(keys) <= 12 + 2 + 1


def test_the_state_does_not_grow_with_the_run(folder):
    stream = make_source(tar_set(folder), shuffle_images=1000)
    batches(stream, range(100))
    assert len(str(state_of(stream))) < 500


def test_other_shards_or_ratios_are_rejected_and_moved_shards_accepted(folder, tmp_path):
    stream = make_source(tar_set(folder))
    expected = batches(stream, range(3))
    state = state_of(stream)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    there = make_source(tar_set(moved))
    there.load_state_dict([state])
    expected = [(ratio, pixels) for ratio, _, pixels, _ in batches(stream, range(3, 9))]
    assert [(ratio, pixels) for ratio, _, pixels, _ in batches(there, range(3, 9))] == expected
    (moved / "shard-000003.tar").unlink()
    with pytest.raises(UserError, match="4 other shards than these 3"):
        make_source(tar_set(moved)).load_state_dict([state])
    with pytest.raises(UserError, match=r"the ratios \[8, 16, 32\], the data has \[8, 16\]"):
        make_source(tar_set(folder), shares={8: 1.0, 16: 1.0}).load_state_dict([state])


@pytest.mark.parametrize("kind", [FolderShards, IndexShards])
def test_images_added_to_a_folder_or_index_are_noticed(tmp_path, kind):
    index = tmp_path / "index.jsonl"

    def source() -> StreamSource:
        index.write_text("".join(f'{{"path": "{path.name}"}}\n' for path in sorted(tmp_path.glob("*.png"))))
        shards = kind(tmp_path if kind is FolderShards else index)
        return make_source(shards, rating=None, shares={16: 1.0})

    for number in range(3, 8):
        (tmp_path / f"{number}.png").write_bytes(image(number))
    state = state_of(source())
    source().load_state_dict([state])
    (tmp_path / "4b.png").write_bytes(image(8))
    with pytest.raises(UserError, match="or for other images or ratios"):
        source().load_state_dict([state])
    del state["shards"]["extent"], state["shards"]["contents"]  # of an earlier version
    source().load_state_dict([state])


def test_another_ratio_in_the_middle_of_an_index_is_noticed(tmp_path):
    index = tmp_path / "index.jsonl"
    (tmp_path / "a.png").write_bytes(image(3))
    rows = [{"path": "a.png", "key": f"k{number}", "ratio": 16} for number in range(5)]

    def source() -> StreamSource:
        index.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return make_source(TrainingShards(IndexShards(index), HeldOut(0.0, 0)), shares={16: 1.0})

    state = state_of(source())
    source().load_state_dict([state])
    rows[2]["ratio"] = 32
    with pytest.raises(UserError, match="or for other images or ratios"):
        source().load_state_dict([state])
    del state["shards"]["contents"]  # of an earlier version
    source().load_state_dict([state])


def test_a_renamed_file_in_the_middle_of_a_folder_is_noticed(tmp_path):
    def source() -> StreamSource:
        return make_source(FolderShards(tmp_path), rating=None, shares={16: 1.0})

    for name in "ace":
        (tmp_path / f"{name}.png").write_bytes(image(3))
    state = state_of(source())
    (tmp_path / "c.png").rename(tmp_path / "d.png")
    with pytest.raises(UserError, match="or for other images or ratios"):
        source().load_state_dict([state])


def test_colours_change_on_request(folder):
    plain = make_source(tar_set(folder)).batch()
    changed = make_source(tar_set(folder), crop=CropSettings(8, 0.5, 0.3)).batch()
    assert plain.keys == changed.keys
    original, other = plain.on("cpu").images, changed.on("cpu").images
    assert other.dtype == original.dtype
    assert not np.allclose(original, other, atol=0.01)
    for before, after in zip(
        original, other, strict=True
    ):  # each channel is one of the old, scaled and shifted
        for channel in after:
            fits = [np.corrcoef(channel.flatten(), old.flatten())[0, 1] for old in before]
            assert max(fits) > 0.9
