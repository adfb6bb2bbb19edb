"""Archives: same samples as webdataset, sidecars, damage, remote file systems and retries."""

import io
import json
import logging
import sys
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
from cat_fast.data.streams.formats.tar_index import Member
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
    assert "line 9: score is skipped" in caplog.text
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
    monkeypatch.setattr(Member, "read", lambda *_: pytest.fail("read"))
    assert [entry.labels for entry in entries(archive)] == [Labels(5, 16, True, False)]
    assert tar_set(archive).categories(0) == {""}


@pytest.mark.parametrize(
    "own", ['{"score": [1]}', '{"score": "5"}', '{"ratio": {}}', "[16]", '{"ratio": true}']
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


def add(tar, name, content=b"", **fields):
    """Add a member of any kind to an open archive."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def new_tar(tmp_path):
    """Return a function that writes members (name, content, fields) to an archive."""

    def write(*files, name="a.tar", mode="w"):
        with tarfile.open(tmp_path / name, mode, format=tarfile.PAX_FORMAT) as tar:
            for file in files:
                add(tar, *file[:2], **(file[2] if len(file) > 2 else {}))
        return tmp_path / name

    return write


def test_links_have_the_content_of_their_targets(new_tar):
    hard, symbolic = {"type": tarfile.LNKTYPE}, {"type": tarfile.SYMTYPE}
    path = new_tar(
        ("x/a.png", image(1)),
        ("x/a.txt", b"a street"),
        ("x/b.png", b"", hard | {"linkname": "x/a.png"}),
        ("x/b.txt", b"", symbolic | {"linkname": "./a.txt"}),
        ("x/c.png", b"", symbolic | {"linkname": "../y/d.png"}),  # to a later member
        ("y/d.png", b"", hard | {"linkname": "./x/b.png"}),
        ("y/e.png", b"", symbolic | {"linkname": "/etc/passwd"}),
        ("y/f.png", b"", symbolic | {"linkname": "f.png"}),
        ("y/g.png", image(2)),
        ("y/g.txt", b"", symbolic | {"linkname": "none.txt"}),
        ("y/h.png", b"", hard | {"linkname": "y/i.png"}),
        ("y/i.png", image(3)),
        ("links", b"", symbolic | {"linkname": "y"}),
    )
    found = {entry.key: entry for entry in entries(path)}
    usable = {key: (entry.read(), entry.labels.caption) for key, entry in found.items() if not entry.damage}
    one = image(1)
    assert usable == {
        "x/a": (one, "a street"),
        "x/b": (one, "a street"),
        "x/c": (one, ""),
        "y/d": (one, ""),
        "y/g": (image(2), ""),
        "y/i": (image(3), ""),
    }
    assert found["y/e"].damage == "symbolic link to /etc/passwd, which is not a file of this archive"
    assert found["y/f"].damage == "symbolic link to f.png, which is not a file of this archive"
    assert found["y/h"].damage == "hard link to y/i.png, which is not a file of this archive"


@pytest.mark.parametrize("format", ["old", "pax"])
def test_sparse_members_are_read(tmp_path, format):
    """Image, hole, image: an encoded image may be followed by zeros."""
    first, hole = image(1), 4096
    content = first + bytes(hole - len(first)) + b"end"
    parts = [(0, len(first)), (hole, 3)]
    stored = b"".join(content[start : start + size] for start, size in parts)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        if format == "pax":
            numbers = [len(parts), *(number for part in parts for number in part)]
            table = "".join(f"{number}\n" for number in numbers).encode()
            names = {"major": "1", "minor": "0", "name": "a.png", "realsize": str(len(content))}
            headers = {f"GNU.sparse.{name}": value for name, value in names.items()}
            add(tar, "GNUSparseFile.0/a.png", table.ljust(512, b"\0") + stored, pax_headers=headers)
        else:
            info = tarfile.TarInfo("a.png")
            info.type, info.size = tarfile.GNUTYPE_SPARSE, len(stored)
            header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
            header[257:265] = b"ustar  \0"
            header[345:500] = bytes(155)
            for place, number in enumerate(number for part in parts for number in part):
                header[386 + 12 * place : 398 + 12 * place] = b"%011o\0" % number
            header[483:495] = b"%011o\0" % len(content)
            header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:512]))
            tar.fileobj.write(header + stored.ljust(-(-len(stored) // 512) * 512, b"\0"))
            tar.offset = tar.fileobj.tell()
        add(tar, "b.png", image(2))
    assert [(entry.key, entry.read()) for entry in entries(path)] == [("a", content), ("b", image(2))]


def test_global_headers_are_not_damage(new_tar):
    comment = tarfile.TarInfo.create_pax_global_header({"comment": "c" * 600})
    parts = [new_tar((f"{n}.png", image(n))).read_bytes().rstrip(b"\0") for n in range(3)]
    padded = [part + bytes(-len(part) % 512) for part in parts]
    path = new_tar()
    path.write_bytes(comment + comment + padded[0] + comment + padded[1] + padded[2] + comment + bytes(1024))
    found = entries(path)
    assert [(entry.key, entry.damage, entry.read()) for entry in found] == [
        (str(n), "", image(n)) for n in range(3)
    ]


def test_hidden_members_are_ignored(new_tar):
    path = new_tar(
        ("._a", b"x"),
        ("x/._a.png", b"x"),
        ("x/a.png", image(1)),
        ("__MACOSX/x/._a.png", b"x"),
        ("x/.DS_Store", b"x"),
        ("x/a.txt", b"a street"),
    )
    (entry,) = entries(path)
    assert (entry.key, entry.read(), entry.labels.caption) == ("x/a", image(1), "a street")


def test_names_are_equal_with_and_without_dot_slash(new_tar):
    path = new_tar(("./x//a.png", image(1)), ("x/./a.txt", b"a street"), ("./b.png", image(2)))
    write_sidecar(path, [{"key": "x/a", "score": 3}, {"key": "./b", "score": 4}])
    found = [(entry.key, entry.labels.score, entry.labels.caption) for entry in entries(path)]
    assert found == [("x/a", 3, "a street"), ("b", 4, "")]


def test_a_repeated_file_name_starts_another_sample(new_tar):
    path = new_tar(
        *[("a.png", image(1)), ("a.cls", b"1"), ("a.png", image(2)), ("a.txt", b"second")],
        *[("b.cls", b"3"), ("b.png", image(3)), ("b.png", image(4)), ("b.cls", b"4"), ("b.PNG", image(5))],
    )
    found = [(e.key, e.read(), e.labels.category, e.labels.caption) for e in entries(path)]
    assert found == [
        ("a", image(1), "1", ""),
        ("a", image(2), "", "second"),
        ("b", image(3), "3", ""),
        ("b", image(4), "4", ""),
        ("b", image(5), "", ""),
    ]


def test_labels_apart_from_their_image_are_reported_by_name(new_tar):
    path = new_tar(
        ("b.cls", b"1"), ("a.png", image(1)), ("b.png", image(2)), ("a.cls", b"2"), ("c.cls", b"3")
    )
    damage = {(entry.key, entry.damage) for entry in entries(path) if entry.damage}
    apart = (
        "its labels (cls) are apart from its image, which is used without them; the files of a sample must be"
    )
    assert damage == {
        ("b", f"{apart} adjacent"),
        ("a", f"{apart} adjacent"),
        ("c", "expected an image file, got cls"),
    }


def test_extensions_of_several_parts(new_tar, caplog):
    path = new_tar(
        *[("a.input.JPG", image(1)), ("a.caption.txt", b"a street"), ("a.meta.json", b'{"score": 3}')],
        *[("b.mask.png", image(2)), ("b.png", image(3)), ("b.old.txt", b"a lane"), ("b.txt", b"a road")],
        *[("c.input.png", image(4)), ("c.edited.png", image(5))],
        *[("d.png", image(6)), ("d.en.txt", b"a"), ("d.fr.txt", b"b")],
        *[("e.jpg", image(7)), ("e.png", image(8))],
    )
    found = {entry.key: entry for entry in entries(path)}
    assert [
        (key, e.read(), e.labels.caption, e.labels.score) for key, e in found.items() if not e.damage
    ] == [
        ("a", image(1), "a street", 3),
        ("b", image(3), "a road", None),
        ("d", image(6), "", None),
    ]
    assert found["c"].damage.startswith(
        "2 images in one sample (input.png, edited.png); a key ends at the first dot"
    )
    assert found["e"].damage.startswith("2 images in one sample (jpg, png)")
    assert "d.en.txt and fr.txt is skipped: expected one .txt file" in caplog.text


def test_of_several_images_one_can_be_chosen(new_tar):
    files = [
        ("a.input.png", image(1)),
        ("a.edited.png", image(2)),
        ("b.input.png", image(3)),
        ("b.png", image(4)),
    ]
    path = new_tar(*files, ("c.png", image(5)))
    shards = tar_set(path)
    chosen = type(shards)(shards.names, shards.remote, shards.problems, ".Input.PNG")
    first, second, third = chosen.open(0).entries(0)
    assert [first.read(), second.read()] == [image(1), image(3)]
    assert third.damage == "expected input.png, got png"


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tbz2", "a.txz", "a.tzst"])
def test_compression_follows_from_the_content(new_tar, tmp_path, kind, name):
    path = new_tar(("a.png", image(1)), name=name, mode=f"w:{kind}")
    path.with_name("a.scores.jsonl").write_text('{"key": "a", "score": 3}')
    path.with_name("._a.tar").write_bytes(b"x")
    for pattern in (path, tmp_path):
        (entry,) = entries(pattern)
        assert (entry.read(), entry.labels.score) == (image(1), 3)
    memory = f"memory://compressed-{kind}/{name}"
    fsspec.filesystem("memory").pipe_file(memory, path.read_bytes())
    assert [entry.read() for entry in entries(memory)] == [image(1)]


def test_the_case_of_an_extension_does_not_matter(new_tar, tmp_path):
    path = new_tar(("A.PNG", image(1)), name="A.TAR")
    path.with_name("A.scores.jsonl").write_text('{"key": "A", "score": 3}')
    for pattern in (path, tmp_path):
        (entry,) = entries(pattern)
        assert (entry.read(), entry.labels.score) == (image(1), 3)


def test_a_plain_archive_may_be_named_like_a_compressed_one(new_tar):
    assert [entry.read() for entry in entries(new_tar(("a.png", image(1)), name="a.tar.gz"))] == [image(1)]


def test_a_damaged_compressed_archive_cannot_be_opened(new_tar):
    path = new_tar(("a.png", image(1)), mode="w:gz")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UnreadableShard, match="end-of-stream marker"):
        entries(path, StreamConfig(attempts=1))


SKIPPABLE = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
"""Frame without content, as pzstd writes before each frame."""


def zstd_frame(content: bytes) -> bytes:
    """Return content as a zstd frame of uncompressed blocks (RFC 8878)."""
    header = bytes([0b10100000]) + len(content).to_bytes(4, "little")  # one segment, its size in 4 bytes
    size = 1 << 17
    blocks = [content[start : start + size] for start in range(0, len(content), size)]
    last = len(blocks) - 1
    return (
        b"\x28\xb5\x2f\xfd"
        + header
        + b"".join(
            (len(block) << 3 | (number == last)).to_bytes(3, "little") + block
            for number, block in enumerate(blocks)
        )
    )


@pytest.mark.parametrize("name", ["a.tar", "a.tar.zst", "a.tzst", "a.tar.gz"])
@pytest.mark.parametrize("start", [b"", SKIPPABLE])
def test_an_archive_of_zstd_names_the_package_that_reads_it(new_tar, monkeypatch, name, start):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = new_tar(("a.png", image(1)), name=name)
    path.write_bytes(start + zstd_frame(path.read_bytes()))
    with pytest.raises(
        UnreadableShard, match=r"compressed with zstd: decompress it, or pip install zstandard$"
    ):
        entries(path)


def test_all_frames_of_a_zstd_archive_are_read(new_tar):
    pytest.importorskip("zstandard")
    path = new_tar(("a.png", image(1)), ("b.png", image(2)), name="a.tar.zst")
    content = path.read_bytes()
    whole = SKIPPABLE + zstd_frame(content[:700]) + SKIPPABLE + zstd_frame(content[700:])
    path.write_bytes(whole)
    assert [entry.read() for entry in entries(path)] == [image(1), image(2)]
    path.write_bytes(whole[:-100])
    with pytest.raises(UnreadableShard, match="end-of-stream marker"):
        entries(path, StreamConfig(attempts=1))


def test_another_score_keeps_caption_and_class(tmp_path, caplog):
    own = {"score": 5.63, "caption": "a street", "category": "cat"}
    samples = [{"__key__": key, "png": image(1), "json": json.dumps(own).encode()} for key in "ab"]
    path = write_tar(tmp_path / "a.tar", samples)
    write_sidecar(path, [{"key": "b", "score": 6.1, "category": "dog"}])
    assert [entry.labels for entry in entries(path)] == [
        Labels(caption="a street", category="cat"),
        Labels(caption="a street", category="dog"),
    ]
    assert "a.json: score is skipped: expected an integer from 1 to 9, got 5.63" in caplog.text
    assert "line 1: score is skipped" in caplog.text


def test_a_byte_order_mark_is_not_text_and_invalid_files_keep_the_others(tmp_path, caplog):
    bom = b"\xef\xbb\xbf"
    samples = [
        {
            "__key__": "a",
            "png": image(1),
            "json": bom + b'{"score": 3}',
            "txt": bom + b"a\r\n",
            "cls": bom + b"7\n",
        },
        {"__key__": "b", "png": image(1), "json": b"{", "txt": b"b", "cls": b"7"},
        {"__key__": "c", "png": image(1), "json": b'{"score": 3}', "txt": b"caf\xe9", "cls": b"7"},
        {"__key__": "d", "png": image(1), "json": b'{"has_text": "no"}', "txt": b"d", "cls": b"7"},
    ]
    path = write_tar(tmp_path / "a.tar", samples)
    path.with_name("a.scores.jsonl").write_bytes(bom + b'{"key": "b", "score": 4}\n\n')
    assert [(e.labels.score, e.labels.caption, e.labels.category) for e in entries(path)] == [
        (3, "a", "7"),
        (4, "b", "7"),
        (3, "", "7"),
        (None, "d", "7"),
    ]
    for file in ("b.json", "c.txt", "d.json"):
        assert f"{file} is skipped" in caplog.text


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
