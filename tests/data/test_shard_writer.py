"""Shard writer: images unchanged, labels in sidecars, reproducible bytes."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from cat_fast.data import shard_writer
from cat_fast.data.images.index import ImageRecord, read_index, write_index
from cat_fast.data.ratio_origin import ScoredBy
from cat_fast.data.shard_writer import IndexLines, write_shards
from cat_fast.data.streams.formats.base import Labels
from cat_fast.errors import UserError
from tests.data.streams.sets import image, tar_set


@pytest.fixture
def index(tmp_path):
    """Write 23 images, with keys that are not valid in an archive."""
    records = []
    for n in range(23):
        kind = ("png", "JPG", "webp")[n % 3]
        path = tmp_path / f"image {n}.{kind}"
        path.write_bytes(image(n, {"png": "PNG", "JPG": "JPEG", "webp": "WEBP"}[kind]))
        records.append(
            ImageRecord(
                key=f"{'same' if n < 2 else f'dir/über.{n}'}{'x' * 150 if n == 3 else ''}",
                path=path.name,
                caption="Straße",
                has_text=n % 5 == 0,
                has_faces=False,
                score=n % 9 + 1,
                ratio=(8, 16, 32)[n % 3],
                scored_by=None if n % 7 == 0 else ScoredBy("words", f"{n % 2}", (2, 6)),
            )
        )
    write_index(tmp_path / "index.jsonl", records)
    return tmp_path / "index.jsonl"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_image_is_in_one_shard_with_its_labels(index, tmp_path):
    out = tmp_path / "out"
    written = list(write_shards(IndexLines(index), out, per_shard=5, seed=0))
    assert [w.records for w in written] == [5, 5, 5, 5, 3]
    shards = tar_set(out)
    found = {}
    for number in range(len(shards.names)):
        for entry in shards.open(number).entries(0):
            assert entry.damage == ""
            found[entry.read()] = entry.labels
    expected = {Path(r.path).read_bytes(): Labels.of(vars(r)) for r in read_index(index)}
    assert found == expected
    rows = (out / "shard-000000.scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(rows[0])["caption"] == "Straße"
    stored = [json.loads(row)["scored_by"] for row in rows]
    assert {"scorer": "words", "version": "1", "thresholds": [2, 6]} in stored
    assert "Straße" in rows[0]


def test_json_and_sidecar_have_the_same_labels(index, tmp_path):
    out = tmp_path / "out"
    list(write_shards(IndexLines(index), out, per_shard=30, seed=0))
    with_sidecar = [entry.labels for entry in tar_set(out).open(0).entries(0)]
    (out / "shard-000000.scores.jsonl").unlink()
    assert [entry.labels for entry in tar_set(out).open(0).entries(0)] == with_sidecar


def test_an_interrupted_run_resumes_to_the_same_files(index, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    list(write_shards(IndexLines(index), straight, per_shard=5, seed=0))
    list(islice(write_shards(IndexLines(index), stopped, per_shard=5, seed=0), 2))
    # An archive without a sidecar is incomplete.
    (stopped / "shard-000001.scores.jsonl").unlink()
    (stopped / "shard-000001.tar").write_bytes(b"half")
    before = (stopped / "shard-000000.tar").stat().st_mtime_ns
    list(write_shards(IndexLines(index), stopped, per_shard=5, seed=0))
    assert contents(stopped) == contents(straight)
    assert (stopped / "shard-000000.tar").stat().st_mtime_ns == before


def test_every_shard_has_the_mix_of_the_data_set(tmp_path):
    (tmp_path / "a.png").write_bytes(image(0))
    record = ImageRecord(key="a", path="a.png", caption="", has_text=False, has_faces=False, score=1, ratio=8)
    records = [replace(record, key=f"k{n}", ratio=8 if n < 100 else 32) for n in range(200)]
    write_index(tmp_path / "index.jsonl", records)
    out = tmp_path / "out"
    list(write_shards(IndexLines(tmp_path / "index.jsonl"), out, per_shard=50, seed=0))
    shards = tar_set(out)
    for number in range(4):
        assert 10 < sum(label.ratio == 8 for label in shards.labels(number)) < 40


def test_the_seed_determines_the_order_of_the_images(index, tmp_path):
    orders = []
    for number, seed in enumerate((0, 1, 1)):
        out = tmp_path / f"out{number}"
        list(write_shards(IndexLines(index), out, per_shard=5, seed=seed))
        shards = tar_set(out)
        orders.append([entry.key for n in range(len(shards.names)) for entry in shards.open(n).entries(0)])
    assert orders[0] != orders[1] == orders[2]
    assert len(orders[0]) == 23


def test_missing_images_are_reported_and_skipped(index, tmp_path):
    (index.parent / "image 7.JPG").unlink()
    (written,) = write_shards(IndexLines(index), tmp_path / "out", per_shard=100, seed=0)
    assert len(written.missing) == 1
    assert "image 7.JPG" in written.missing[0]
    assert len(list(tar_set(tmp_path / "out").open(0).entries(0))) == 22


def test_another_index_or_other_settings_are_rejected_in_the_same_folder(index, tmp_path):
    out = tmp_path / "out"
    list(write_shards(IndexLines(index), out, per_shard=5, seed=0))
    for per_shard, seed in [(6, 0), (5, 1)]:
        with pytest.raises(UserError, match="contains shards made with other settings"):
            list(write_shards(IndexLines(index), out, per_shard, seed))
    before, records = contents(out), read_index(index)
    for changed, named in [
        (records[2:], "'dir/über.2' has other labels"),
        (records[:-1], "1 are missing, after 'dir/über.21"),
        ([*records, replace(records[0], key="more")], "'more' is new"),
        *(
            ([*records[:7], replace(records[7], **change), *records[8:]], "'dir/über.7' has other labels")
            for change in (
                {"ratio": 64}, {"score": 1}, {"caption": "Strasse"}, {"has_text": True}, {"has_faces": True},
                {"category": "sea"},
            )
        ),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=f"started with other images: {named}"):
            list(write_shards(changed, out, 5, 0))
    assert contents(out) == before
    with pytest.raises(UserError, match="at least 1"):
        list(write_shards(IndexLines(index), tmp_path / "new", 0, 0))


def test_changed_images_are_named_and_copied_ones_resume(index, tmp_path, monkeypatch):
    out, path = tmp_path / "out", tmp_path / "image 7.JPG"
    list(write_shards(IndexLines(index), out, per_shard=5, seed=0))
    before, kept = {p: p.stat().st_mtime_ns for p in out.glob("*.tar")}, path.read_bytes()
    path.write_bytes(image(99, "JPEG"))
    with pytest.raises(UserError, match=r"other images: 'dir/über\.7': its image differs; restore them"):
        list(write_shards(IndexLines(index), out, per_shard=5, seed=0))
    path.write_bytes(kept)  # with a new modification time
    monkeypatch.chdir(tmp_path)
    read, read_file = [], shard_writer.read_file
    monkeypatch.setattr(shard_writer, "read_file", lambda p: read.append(p) or read_file(p))
    for _ in range(2):  # the second time, the new time is known
        list(write_shards(IndexLines("index.jsonl"), out, per_shard=5, seed=0))
    assert read == ["image 7.JPG"]
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_missing_images_are_reported_again_until_they_are_there(index, tmp_path):
    out, path = tmp_path / "out", tmp_path / "image 7.JPG"
    kept = path.read_bytes()
    path.unlink()
    for _ in range(2):
        written = list(write_shards(IndexLines(index), out, per_shard=5, seed=0))
        (line,) = [line for shard in written for line in shard.missing]
        assert line.startswith(f"{path}: ")
    path.write_bytes(kept)
    assert not any(w.missing for w in write_shards(IndexLines(index), out, per_shard=5, seed=0))
    list(write_shards(IndexLines(index), tmp_path / "direct", per_shard=5, seed=0))
    assert contents(out) == contents(tmp_path / "direct")


def test_an_index_on_disk_equals_one_in_memory(index):
    lines = IndexLines(index)
    assert list(lines) == read_index(index)
    with pytest.raises(UserError, match="no such file"):
        IndexLines(index.with_name("none"))


@pytest.mark.parametrize("seed", range(8))
def test_keys_that_look_like_numbered_duplicates_stay_apart(tmp_path, seed):
    path = tmp_path / "image.png"
    path.write_bytes(image(0))
    records = [
        ImageRecord(key=key, path=str(path), caption=f"{n}", has_text=None, has_faces=None, score=5, ratio=16)
        for n, key in enumerate(["a", "a", "a_1", "a_2", "a_3"])
    ]
    list(write_shards(records, tmp_path / "out", per_shard=5, seed=seed))
    entries = list(tar_set(tmp_path / "out").open(0).entries(0))
    assert len({entry.key for entry in entries}) == 5
    assert {entry.labels.caption for entry in entries} == {"0", "1", "2", "3", "4"}
