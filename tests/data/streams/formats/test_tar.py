"""Archives: same samples as webdataset, sidecars, damage, remote file systems and retries."""

import json
import logging
import tarfile
import tempfile

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_fast.data.streams import open_shards
from cat_fast.data.streams.formats import tar as tar_shards
from cat_fast.data.streams.formats.base import Labels, UnreadableShard
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.formats.remote import Remote
from cat_fast.data.streams.formats.sidecar import sidecar_url, write_sidecar
from cat_fast.errors import UserError
from tests.data.streams.sets import batches, image, make_source, tar_set, write_shards, write_tar

FAST_RETRIES = StreamConfig(first_wait=0.0)


def entries(path, config=FAST_RETRIES):
    return list(tar_set(path, config).open(0).entries(0))


def read(entry):
    return None if entry.damage else entry.read()


@pytest.fixture
def archive(tmp_path):
    """Write ten images in three formats, each with JSON, in a folder of the archive."""
    samples = []
    for n in range(10):
        kind = ("png", "jpg", "webp")[n % 3]
        content = image(n, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[kind])
        own = {"score": n % 9 + 1, "has_text": n % 2 == 0, "caption": "a street"}
        samples.append({"__key__": f"part/{n:03d}", kind: content, "json": json.dumps(own).encode()})
    return write_tar(tmp_path / "shard-000000.tar", samples)


def test_samples_are_the_same_as_those_of_webdataset(archive):
    reference = list(webdataset.WebDataset(str(archive), shardshuffle=False))
    ours = entries(archive)
    assert [entry.key for entry in ours] == [sample["__key__"] for sample in reference]
    for entry, sample in zip(ours, reference, strict=True):
        assert entry.read() == next(sample[kind] for kind in ("png", "jpg", "webp") if kind in sample)
        own = json.loads(sample["json"])
        assert entry.labels == Labels.of(own)
    assert [entry.number for entry in tar_set(archive).open(0).entries(4)] == list(range(4, 10))


def test_a_sidecar_overrides_the_samples_and_json_lines_equal_parquet(archive, caplog):
    rows = [{"key": f"part/{n:03d}", "score": 9, "ratio": 8, "has_text": False} for n in range(8)]
    lines = "\n".join(map(json.dumps, rows)) + '\n{"key": "part/008", "score": 2.5}\nnonsense\n'
    by_lines = archive.with_name("shard-000000.scores.jsonl")
    by_lines.write_text(lines + '{"key": "gone", "score": 1}\n')
    found = [entry.labels for entry in entries(archive)]
    assert found == [Labels(9, 8, False, caption="a street")] * 8 + [
        Labels(9, None, True, caption="a street"),
        Labels(1, None, False, caption="a street"),
    ]
    assert "line 9 is skipped" in caplog.text
    assert "line 10 is skipped" in caplog.text
    assert "gone is skipped" in caplog.text
    by_lines.unlink()
    table = pyarrow.Table.from_pylist([*rows, {"key": "gone", "score": 1}])
    pyarrow.parquet.write_table(table, sidecar_url(str(archive), ".scores.parquet"))
    assert [entry.labels for entry in entries(archive)] == found


def test_a_sample_without_image_is_damaged_and_an_image_without_json_is_not(tmp_path):
    path = write_tar(tmp_path / "a.tar", [{"__key__": "a", "json": b"{}"}, {"__key__": "b", "png": image(1)}])
    first, second = entries(path)
    assert "expected an image file, got json" in first.damage
    assert second.labels == Labels()
    assert second.read() == image(1)


def test_json_overrides_caption_and_class_files(tmp_path):
    plain = {"png": image(1), "txt": "Straße\n".encode(), "cls": b"7"}
    own = json.dumps({"score": 3, "caption": "a street"}).encode()
    samples = [
        {"__key__": "a", **plain},
        {"__key__": "b", "json": own, **plain},
        {"__key__": "c", "png": b"", "txt": b"\xff"},
    ]
    labels = [entry.labels for entry in entries(write_tar(tmp_path / "a.tar", samples))]
    assert labels == [
        Labels(caption="Straße", category="7"),
        Labels(score=3, caption="a street", category="7"),
        Labels(),
    ]


@pytest.mark.parametrize("table", [False, True])
def test_a_sidecar_overrides_only_the_labels_that_it_sets(tmp_path, table):
    own = {"score": 2, "ratio": 32, "has_text": True, "has_faces": True, "caption": None}
    sample = {"png": image(1), "json": json.dumps(own).encode(), "txt": b"a street", "cls": b"7"}
    archive = write_tar(tmp_path / "a.tar", [{"__key__": key, **sample} for key in "abc"])
    rows = [
        {"key": "a", "score": 5, "has_text": None, "caption": None, "category": None},
        {"key": "b", "has_text": False, "caption": "a lane", "category": "9"},
    ]
    if table:
        url = sidecar_url(str(archive), ".scores.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), url)
    else:
        write_sidecar(archive, [{k: v for k, v in row.items() if v is not None} for row in rows])
    assert [entry.labels for entry in entries(archive)] == [
        Labels(5, None, True, True, "a street", "7"),  # a new score is not combined with the old ratio
        Labels(2, 32, False, True, "a lane", "9"),
        Labels(2, 32, True, True, "a street", "7"),
    ]


def test_broken_json_loses_only_its_own_labels(tmp_path, caplog):
    archive = write_tar(tmp_path / "a.tar", [{"__key__": "a", "png": image(1), "json": b'{"score": [1]}'}])
    write_sidecar(archive, [{"key": "a", "score": 5}])
    assert [entry.labels for entry in entries(archive)] == [Labels(5)]
    assert "a.json is skipped" in caplog.text


def test_a_complete_sidecar_avoids_reading_the_samples_labels(tmp_path, monkeypatch):
    given = {"score": 5, "ratio": 16, "has_text": True, "has_faces": False, "caption": "", "category": ""}
    archive = write_tar(tmp_path / "a.tar", [{"__key__": "a", "png": image(1), "cls": b"7"}])
    write_sidecar(archive, [{"key": "a", **given}])
    monkeypatch.setattr(tar_shards.TarShard, "_read", lambda *_: pytest.fail("read"))
    assert [entry.labels for entry in entries(archive)] == [Labels(5, 16, True)]
    assert tar_set(archive).categories(0) == {""}


@pytest.mark.parametrize(
    "own", ['{"score": [1]}', '{"score": Infinity}', '{"ratio": {}}', "[16]", '{"ratio": true}']
)
def test_an_invalid_label_skips_only_its_sample(tmp_path, caplog, own):
    samples = [{"__key__": f"{n}", "png": image(n), "json": b'{"ratio": 16}'} for n in range(4)]
    samples[2]["json"] = own.encode()
    write_tar(tmp_path / "shard-000000.tar", samples)
    found = batches(make_source(tar_set(tmp_path), shares={16: 1.0}, batch_size=3), range(4))
    assert {key.split(": ")[1] for _, keys, *_ in found for key in keys} == {"0", "1", "3"}
    assert found[-1][3] >= 4
    assert "2.json is skipped" in caplog.text


def test_names_with_invalid_unicode_are_supported(tmp_path):
    samples = [{"__key__": key, "png": image(1), "json": b'{"ratio": 16}'} for key in ("a", "b\udcff")]
    write_tar(tmp_path / "shard-\udcff.tar", samples)
    ((_, keys, *_),) = batches(make_source(tar_set(tmp_path), shares={16: 1.0}), range(1))
    assert sorted(key.split(": ")[1] for key in keys) == ["a", "b\udcff"]


def test_a_damaged_header_skips_only_its_member(archive):
    with tarfile.open(archive) as tar:
        header = next(m.offset for m in tar.getmembers() if m.name == "part/004.jpg")
    whole = {entry.key: entry.read() for entry in entries(archive)}
    content = bytearray(archive.read_bytes())
    content[header : header + 8] = b"damaged!"
    archive.write_bytes(content)
    found = entries(archive)
    usable = {entry.key: entry.read() for entry in found if not entry.damage}
    assert usable == {key: content for key, content in whole.items() if key != "part/004"}
    assert any("no archive member up to byte" in entry.damage for entry in found)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1))
def test_a_truncated_archive_yields_all_samples_before_the_cut(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("cut")
    path = write_shards(folder, [[16] * 6]) / "shard-000000.tar"
    whole = {entry.key: entry.read() for entry in entries(path)}
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [m.offset_data + m.size for m in tar.getmembers()]
        end = max(-(-end // 512) * 512 for end in ends)
    cut = int(share * end)
    path.write_bytes(content[:cut])
    expected = sum(stop <= cut for stop in ends)
    if not expected:
        with pytest.raises(UnreadableShard):
            entries(path)
        return
    found = entries(path)
    usable = {entry.key: entry.read() for entry in found if not entry.damage}
    assert usable == dict(list(whole.items())[:expected])
    assert sum(bool(entry.damage) for entry in found) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=30))
def test_random_damage_never_raises(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("damaged")
    path = write_shards(folder, [[16] * 3, [16] * 2]) / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[int(place * len(content))] = value
    path.write_bytes(content)
    stream = make_source(tar_set(folder), shares={16: 1.0})
    found = batches(stream, range(5))
    assert {len(keys) for _, keys, *_ in found} == {2}


def test_patterns_folders_and_lists_return_shards_in_order(tmp_path):
    folder = write_shards(tmp_path / "a", [[8]] * 3)
    other = write_shards(tmp_path / "b", [[8]] * 2)
    names = [f"{folder}/shard-{n:06d}.tar" for n in range(3)]

    def list_shards(pattern):
        return tar_shards.list_shards(pattern, Remote(FAST_RETRIES, ProblemLog()))

    assert list_shards(str(folder)) == list_shards(f"{folder}/*.tar") == names
    assert list_shards(f"{folder}/shard-{{000000..000002}}.tar") == names
    both = list_shards(f"{other}::{names[2]}")
    assert both == [f"{other}/shard-000000.tar", f"{other}/shard-000001.tar", names[2]]
    assert list_shards(f"{tmp_path}/*/shard-*[12].tar") == [*names[1:], f"{other}/shard-000001.tar"]
    assert list_shards(f"{tmp_path}/**/*.tar") == [*names, *both[:2]]
    assert list_shards("s3://bucket/x-{0..2}.tar") == [f"s3://bucket/x-{n}.tar" for n in range(3)]
    for pattern, message in {
        str(tmp_path / "none"): "found no archive",
        f"{tmp_path}/none-{{00..99}}.tar": "none-00.tar: no such file",
        f"{folder}::{folder}": "names a shard twice",
        f"{folder}/shard-{{0..": "data.shards",
        "nonsense://bucket/*.tar": "Protocol not known",
    }.items():
        with pytest.raises(UserError, match=message):
            list_shards(pattern)


@pytest.fixture
def remote(tmp_path):
    """Write the same data set to disk and to a file system in memory."""
    folder = write_shards(tmp_path / "shards", [[8, 16, 32] * 2, [16, 8, 32]])
    filesystem = fsspec.filesystem("memory")
    for path in folder.iterdir():
        filesystem.pipe_file(f"/set/{path.name}", path.read_bytes())
    yield folder
    filesystem.rm("/set", recursive=True)


def pixels(shards):
    return [(ratio, content) for ratio, _, content, _ in batches(make_source(shards), range(20))]


@pytest.mark.parametrize(
    "pattern", ["memory://set/*.tar", "memory://set", "memory://set/shard-{000000..000001}.tar"]
)
def test_shards_of_another_file_system_give_the_same_batches(remote, pattern):
    assert pixels(tar_set(pattern)) == pixels(tar_set(remote))
    assert pixels(tar_set(f"file://{remote}/*.tar")) == pixels(tar_set(remote))


def test_a_compressed_archive_is_read(tmp_path):
    folder = write_shards(tmp_path, [[8, 16, 32] * 2])
    expected = [read(entry) for entry in entries(folder)]
    path = folder / "shard-000000.tar"
    with fsspec.open(f"{path}.gz", "wb", compression="gzip") as file:
        file.write(path.read_bytes())
    found = entries(f"{path}.gz")
    assert [read(entry) for entry in found] == expected
    assert [entry.labels.ratio for entry in found] == [8, 16, 32] * 2


class Flaky:
    """Fault injection: opening files of the memory file system fails `failures` times."""

    def __init__(self, monkeypatch, failures, short=False):
        self.left = failures
        self.tried = 0
        original = MemoryFileSystem._open

        def open_it(filesystem, path, *args, **kwargs):
            self.tried += path.endswith(".tar")
            if path.endswith(".tar") and self.left:
                self.left -= 1
                if not short:
                    raise ConnectionResetError("the line is down")
                file = original(filesystem, path, *args, **kwargs)
                file.seek(file.size // 2)  # the first half is missing
                return file
            return original(filesystem, path, *args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, "_open", open_it)


@pytest.mark.parametrize("pattern", ["memory://set", "memory://set/*.tar", "memory://s*/*.tar"])
def test_a_failed_listing_is_retried(remote, monkeypatch, caplog, pattern):
    original, failures = MemoryFileSystem.ls, [ConnectionResetError("the line is down")] * 3

    def ls(filesystem, path, *args, **kwargs):
        if failures:
            raise failures.pop()
        return original(filesystem, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "ls", ls)
    assert [name[-10:] for name in tar_set(pattern, FAST_RETRIES).names] == ["000000.tar", "000001.tar"]
    assert "the line is down; trying again" in caplog.text
    failures.extend([ConnectionResetError("the line is down")] * 5)
    with pytest.raises(UserError, match=r"data\.shards: memory://s.*: the line is down, after 5 attempts"):
        tar_set(pattern, FAST_RETRIES)


def test_a_full_scratch_folder_raises_an_error_and_skips_no_shard(remote, monkeypatch):
    source = make_source(tar_set("memory://set", FAST_RETRIES))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb+"))  # noqa: SIM115
    with pytest.raises(UserError, match=r"data\.stream\.scratch: .*: No space left on device; free space"):
        source.batch()


def test_a_missing_scratch_folder_is_rejected_at_the_start(tmp_path):
    gone = tmp_path / "gone"
    with pytest.raises(UserError, match=rf"data\.stream\.scratch: {gone}: No such file or directory"):
        Remote(StreamConfig(scratch=str(gone)), ProblemLog())


@pytest.mark.parametrize("short", [False, True])
def test_a_failed_shard_is_retried(remote, monkeypatch, caplog, short):
    expected = pixels(tar_set(remote))
    flaky = Flaky(monkeypatch, failures=3, short=short)
    assert pixels(tar_set("memory://set", FAST_RETRIES)) == expected
    assert flaky.left == 0
    assert "trying again" in caplog.text


def test_a_shard_that_cannot_be_opened_is_skipped_or_stops_the_run(remote, caplog):
    fsspec.filesystem("memory").pipe_file("/set/shard-000002.tar", b"")
    names = "memory://set/shard-{000000..000003}.tar"  # the third is empty, the fourth missing
    found = batches(make_source(tar_set(names, FAST_RETRIES)), range(20))
    assert {key.split(":")[1][-10:] for _, keys, *_ in found for key in keys} == {"000000.tar", "000001.tar"}
    assert found[-1][3] > 0
    assert "shard-000003.tar is skipped: FileNotFoundError" in caplog.text
    stopping = make_source(tar_set(names, FAST_RETRIES), unreadable="stop")
    with pytest.raises(UserError, match=r"shard-00000[23]\.tar cannot be opened.*unreadable=skip"):
        batches(stopping, range(20))


def test_the_run_stops_when_no_shard_can_be_opened(remote, monkeypatch):
    monkeypatch.setattr(open_shards, "MAX_CONSECUTIVE_UNREADABLE", 1)
    Flaky(monkeypatch, failures=10**9)
    with pytest.raises(UserError, match=r"the line is down, after 5 attempts.*like the 1 before"):
        batches(make_source(tar_set("memory://set", FAST_RETRIES)), range(20))


def test_warnings_are_rate_limited(tmp_path, caplog):
    folder = write_shards(tmp_path, [[16] * 50])
    (folder / "shard-000000.scores.jsonl").write_text('{"key": "0-0", "ratio": 16}\n')
    with caplog.at_level(logging.WARNING, logger="cat_fast.data"):
        make_source(tar_set(folder), shares={16: 1.0}, batch_size=1).batch()
    assert 1 <= len(caplog.records) <= 10
