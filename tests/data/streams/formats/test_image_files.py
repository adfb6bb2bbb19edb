"""Images in separate files: an index of any length, a folder."""

import json
from dataclasses import asdict, replace

import pytest

from cat_fast.data.images.index import ImageRecord, read_index, write_index
from cat_fast.data.streams.formats import image_files
from cat_fast.data.streams.formats.base import Labels
from cat_fast.data.streams.formats.image_files import FolderShards, IndexShards
from cat_fast.errors import UserError
from tests.data.streams.sets import batches, image, make_source, state_of


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Write an index of 25 images, ten per shard."""
    monkeypatch.setattr(image_files, "FILES_PER_SHARD", 10)
    records = []
    for n in range(25):
        path = f"images/{n:02d}.png"
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(image(n))
        flags = {"has_text": n % 2 == 1, "has_faces": False}
        ratio = (8, 16, 32)[n % 3]
        records.append(ImageRecord(key=f"k{n}", path=path, caption="a", score=5, ratio=ratio, **flags))
    write_index(tmp_path / "index.jsonl", records)
    return tmp_path / "index.jsonl"


def test_an_index_on_disk_equals_the_index_in_memory(index):
    shards = IndexShards(index)
    entries = [entry for n in range(len(shards.names)) for entry in shards.open(n).entries(0)]
    assert len(shards.names) == 3
    for entry, record in zip(entries, read_index(index), strict=True):
        assert entry.key == record.key
        assert entry.labels == Labels.of(vars(record))
    assert [entry.read() for entry in entries] == [image(n) for n in range(25)]


def test_missing_files_and_broken_lines_are_skipped(index, caplog):
    (index.parent / "images/09.png").unlink()
    lines = index.read_text().splitlines(keepends=True)
    lines[11] = '{"key": "k11"}\n'
    index.write_text("".join(lines))
    stream = make_source(IndexShards(index), batch_size=1)
    found = batches(stream, range(150))
    drawn = {key.split(": ")[1] for _, keys, *_ in found for key in keys}
    assert drawn == {f"k{n}" for n in range(25)} - {"k9", "k11"}
    assert "k9 is skipped: " in caplog.text
    assert "line 12" in caplog.text
    again = make_source(IndexShards(index), batch_size=1)
    again.load_state_dict([state_of(stream)])
    assert batches(again, range(150, 160)) == batches(stream, range(150, 160))


@pytest.mark.parametrize(
    "changes",
    [
        {"ratio": [16]},
        {"score": "five"},
        {"has_text": "true"},
        {"path": 5},
        {"path": None},
        {"path": "a\0b.png"},
        {"path": "\ud800.png"},
        {"key": [7]},
    ],
)
def test_a_field_of_another_type_skips_only_its_line(index, caplog, changes):
    lines = index.read_text().splitlines()
    lines[11] = json.dumps(json.loads(lines[11]) | changes)
    index.write_text("\n".join(lines) + "\n")
    stream = make_source(IndexShards(index), batch_size=1)
    found = batches(stream, range(150))
    drawn = {key.split(": ")[1] for _, keys, *_ in found for key in keys}
    assert drawn == {f"k{n}" for n in range(25)} - {"k11"}
    assert found[-1][3] > 0
    assert "is skipped: " in caplog.text


def test_an_empty_or_missing_index_is_rejected(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        IndexShards(tmp_path / "index.jsonl")
    (tmp_path / "index.jsonl").write_text("")
    with pytest.raises(UserError, match="contains no images"):
        IndexShards(tmp_path / "index.jsonl")


def test_images_of_a_folder_are_used_at_every_ratio(index):
    folder = index.parent
    (folder / "notes.txt").write_text("not an image")
    shards = FolderShards(folder)
    assert len(shards.names) == 3
    assert shards.labels(0) is None
    found = batches(make_source(shards, rating=None, batch_size=5, shares={16: 1.0}), range(5))
    keys = [key.split(": ")[1] for _, its, *_ in found for key in its]
    assert sorted(keys) == [f"images/{n:02d}.png" for n in range(25)]  # one epoch
    with pytest.raises(UserError, match="no such folder"):
        FolderShards(folder / "none")


def test_index_fields_are_kept(index):
    first = json.loads(index.read_text().splitlines()[0])
    assert first == asdict(read_index(index)[0]) | {"path": "images/00.png"}


def test_a_described_folder_has_classes_and_captions(index):
    folder = index.parent
    (folder / "images/03.txt").write_text("a street\n at night")
    (folder / "images/04.txt").write_bytes(b"caf\xe9")
    shards = FolderShards(folder, described=True)
    entries = list(shards.open(0).entries(0))
    assert {entry.labels.category for entry in entries if not entry.damage} == {"images"}
    assert [entry.labels.caption for entry in entries[2:4]] == ["", "a street at night"]
    assert "04.txt: not UTF-8 text" in entries[4].damage
    assert [labels.category for labels in shards.labels(2)] == ["images"] * 5
    assert [entry.labels for entry in FolderShards(folder).open(0).entries(0)] == [Labels()] * 10


def test_blank_lines_do_not_count(index):
    lines = index.read_text().splitlines()
    index.write_text("\ufeff\n" + "\n\n".join(lines) + "\n\n", encoding="utf-8")
    shards = IndexShards(index)
    assert [len(shards.open(n)) for n in range(3)] == [10, 10, 5]
    keys = [entry.key for n in range(3) for entry in shards.open(n).entries(0)]
    assert keys == [f"k{n}" for n in range(25)]
    assert [entry.number for entry in shards.open(1).entries(0)] == list(range(10))


def test_an_index_is_scored_as_it_is_opened(index):
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    for n, row in enumerate(rows):
        if n % 2:
            del row["score"], row["ratio"]
    rows[3]["path"] = None
    index.write_text("\n".join(map(json.dumps, rows)))

    def scoring(records):
        return [r if r.ratio else replace(r, score=1, ratio=32) for r in records]

    entries = list(IndexShards(index, scoring=scoring).open(0).entries(0))
    expected = [rows[n].get("ratio", 32) for n in range(10)]
    assert [e.labels.ratio for e in entries] == [*expected[:3], None, *expected[4:]]
    assert "the field path is missing" in entries[3].damage


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        (["00000/000000001.png", "00000/000000002.png", "00013/000130000.png"], ["", "", ""]),
        (["00/a.png", "00_stats.json", "01/b.png"], ["", "01"]),
        (["00000/000000001.png", "00000/1.png"], ["00000", "00000"]),
        (["00000/00000_00001.png", "00001/00001_00001.png"], ["00000", "00001"]),
        (["0/00001.png", "1/10001.png", "cat/00000/000000001.png"], ["0", "1", "cat"]),
    ],
)
def test_numbered_folders_of_img2dataset_are_not_classes(tmp_path, files, classes):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(image(0))
    shards = FolderShards(tmp_path, described=True)
    assert [entry.labels.category for entry in shards.open(0).entries(0)] == classes
    assert [labels.category for labels in shards.labels(0)] == classes


def test_a_problem_is_reported_once_although_a_shard_is_read_again(tmp_path, caplog):
    path = tmp_path / "index.jsonl"
    path.write_text('{"path": "a.png", "score": 11}\n')
    shards = IndexShards(path)
    for _ in range(3):
        shards.open(0)
    assert caplog.text.count("line 1: score is skipped: expected an integer from 1 to 9, got 11") == 1
