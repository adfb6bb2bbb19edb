"""A started latent folder notices changed labels and images, and resumes with the same ones."""

import json
import os
import shutil

import pytest

from cat_fast.data.images.index import ImageRecord, write_index
from cat_fast.data.latents.dataset import LatentDataset
from cat_fast.data.streams.formats import image_files, tar
from cat_fast.data.streams.formats.base import UnreadableShard
from cat_fast.data.streams.formats.sidecar import write_sidecar
from cat_fast.errors import UserError
from cat_fast.inference.encoding.shard_plan import WorkUnit
from tests.cli.conftest import tiny_tokenizer
from tests.data.streams.sets import image, write_tar
from tests.inference.encoding.test_latent_shards import contents, make

COUNT = 11


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Index of eleven images, with five lines per input shard."""
    monkeypatch.setattr(image_files, "FILES_PER_SHARD", 5)
    folder = tmp_path / "in"
    folder.mkdir()
    records = []
    for n in range(COUNT):
        (folder / f"{n:02d}.png").write_bytes(image(n, size=(64, 64)))
        records.append(
            ImageRecord(
                key=f"k{n:02d}", path=f"{n:02d}.png", caption=f"image {n}", has_text=False, has_faces=False,
                score=n % 9 + 1, ratio=(8, 16, 32)[n % 3], category="sky",
            )
        )  # fmt: skip
    write_index(folder / "index.jsonl", records)
    return folder / "index.jsonl"


def edit(index, number, **values):
    """Change fields of a row; the length of the file may stay."""
    lines = index.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | values)
    index.write_text("\n".join(lines) + "\n")


def refused(tokenizer, source, out, message, **changes):
    before = contents(out)
    with pytest.raises(UserError, match=message) as caught:
        make(tokenizer, source, out, **changes)
    assert str(out) in str(caught.value)
    assert "restore them, choose another folder, or delete this one" in str(caught.value)
    assert contents(out) == before


def test_each_label_of_each_row_counts(tokenizer, index, tmp_path):
    make(tokenizer, index, tmp_path / "out", units=[WorkUnit(0)])
    original = index.read_text()
    for number in (0, 4, 5, 7, COUNT - 1):  # rows of other units, too
        for values in (
            {"ratio": 64}, {"score": 9 - number // 9}, {"caption": f"Image {number}"}, {"has_text": True},
            {"has_faces": True}, {"category": "sea"}, {"key": "new"},
        ):  # fmt: skip
            edit(index, number, **values)
            name = values.get("key", f"k{number:02d}")
            refused(tokenizer, index, tmp_path / "out", f"images: '{name}' has other labels, or is another")
            index.write_text(original)
    assert make(tokenizer, index, tmp_path / "out").encoded == 6


def test_rows_that_are_removed_or_inserted(tokenizer, index, tmp_path):
    make(tokenizer, index, tmp_path / "out")
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:8]))
    refused(tokenizer, index, tmp_path / "out", "'k08' is missing|3 are missing, after 'k07'")
    index.write_text("".join([*lines[:3], *lines[4:]]))
    refused(tokenizer, index, tmp_path / "out", "'k04' has other labels, or is another image")
    index.write_text("".join(lines))
    assert make(tokenizer, index, tmp_path / "out").encoded == 0


def test_other_spellings_of_the_path_and_moved_files_resume(tokenizer, index, tmp_path, monkeypatch):
    make(tokenizer, index, tmp_path / "out", units=[WorkUnit(0)])
    monkeypatch.chdir(tmp_path)
    make(tokenizer, "in/index.jsonl", tmp_path / "out", units=[WorkUnit(1)])
    (tmp_path / "link").symlink_to("in")
    assert make(tokenizer, "./link/index.jsonl", tmp_path / "out").encoded == 1
    index.parent.rename(tmp_path / "moved")
    assert make(tokenizer, "moved/index.jsonl", tmp_path / "out").encoded == 0


@pytest.mark.parametrize("content", [image(99, size=(64, 64)), b"", None])
def test_a_changed_image_is_named(tokenizer, index, tmp_path, content):
    make(tokenizer, index, tmp_path / "out")
    path = index.parent / "06.png"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    reason = "its image differs" if content is not None else "its image cannot be read"
    refused(tokenizer, index, tmp_path / "out", f"other images: 'k06': {reason}")


def test_copied_files_are_read_once(tokenizer, index, tmp_path, monkeypatch):
    make(tokenizer, index, tmp_path / "out")
    latents = {name: data for name, data in contents(tmp_path / "out").items() if name.endswith("tensors")}
    for path in index.parent.glob("*.png"):
        os.utime(path, (1, 1))
    read, read_file = [], image_files.read_file

    def recorded(path):
        read.append(path)
        return read_file(path)

    monkeypatch.setattr(image_files, "read_file", recorded)
    for _ in range(2):  # the second time, the new times are known
        assert make(tokenizer, index, tmp_path / "out").encoded == 0
    assert len(read) == len(set(read)) == COUNT
    assert latents.items() <= contents(tmp_path / "out").items()
    assert len(LatentDataset(tmp_path / "out")) == COUNT


def test_a_skipped_image_that_becomes_readable_is_encoded(tokenizer, index, tmp_path):
    missing, damaged = index.parent / "03.png", index.parent / "07.png"
    kept = missing.read_bytes(), damaged.read_bytes()
    missing.unlink()
    damaged.write_bytes(kept[1][:60])
    assert [s["key"] for s in make(tokenizer, index, tmp_path / "out").skipped] == ["k03", "k07"]
    again = make(tokenizer, index, tmp_path / "out")
    assert (again.encoded, [s["key"] for s in again.skipped]) == (0, ["k03", "k07"])
    missing.write_bytes(kept[0])
    once = make(tokenizer, index, tmp_path / "out")
    assert (once.encoded, [s["key"] for s in once.skipped]) == (4, ["k07"])
    damaged.write_bytes(kept[1])
    assert make(tokenizer, index, tmp_path / "out").encoded == 4
    make(tokenizer, index, tmp_path / "direct")
    assert contents(tmp_path / "out") == contents(tmp_path / "direct")


def test_folder_of_images(tokenizer, index, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "out"
    for n in range(4):
        (folder / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(index.parent / f"{n:02d}.png", folder / "ab"[n % 2])
    (folder / "a/00.txt").write_text("a dog")
    make(tokenizer, folder, out)
    assert make(tokenizer, folder, out).encoded == 0
    (folder / "a/00.txt").write_text("a cat")
    refused(tokenizer, folder, out, r"'a/00\.png': its labels differ")
    (folder / "a/00.txt").write_text("a dog")
    (folder / "b/03.txt").write_text("a new caption")
    refused(tokenizer, folder, out, r"'b/03\.png': its labels differ")
    (folder / "b/03.txt").unlink()
    (folder / "b").rename(folder / "c")  # another class
    refused(tokenizer, folder, out, r"'c/01\.png' has other labels, or is another image")
    (folder / "c").rename(folder / "b")
    shutil.copy(folder / "a/00.png", folder / "a/01.png")
    refused(tokenizer, folder, out, r"'a/01\.png' has other labels, or is another image")


@pytest.fixture
def archives(tmp_path):
    """Two archives of two samples with captions; the second has a sidecar."""
    folder = tmp_path / "tars"
    for name, numbers in {"a": (0, 1), "b": (2, 3)}.items():
        samples = [
            {"__key__": f"k{n}", "png": image(n, size=(64, 64)), "txt": f"image {n}".encode()}
            for n in numbers
        ]
        write_tar(folder / f"{name}.tar", samples)
    write_sidecar(folder / "b.tar", [{"key": f"k{n}", "ratio": 16} for n in (2, 3)])
    return folder


def test_archives_are_opened_again_only_if_they_changed(tokenizer, archives, tmp_path, monkeypatch):
    out = tmp_path / "out"
    make(tokenizer, archives, out, classes=["image"])
    opened, first = [], tar.TarShards.open

    def recorded(shards, number):
        opened.append(number)
        return first(shards, number)

    monkeypatch.setattr(tar.TarShards, "open", recorded)
    assert make(tokenizer, archives, out).encoded == 0
    assert opened == []
    os.utime(archives / "a.tar", (1, 1))
    shutil.copytree(archives, tmp_path / "copy")
    for _ in range(2):
        assert make(tokenizer, tmp_path / "copy", out).encoded == 0
    assert opened == [0]


def test_changed_archives_and_sidecars_are_named(tokenizer, archives, tmp_path):
    out = tmp_path / "out"
    make(tokenizer, archives, out, classes=["image"])
    sidecar = archives / "b.scores.jsonl"
    before = sidecar.read_text()
    sidecar.write_text(before.replace("16", "32", 1))  # the same length
    refused(tokenizer, archives, out, "'k2': its labels differ")
    sidecar.unlink()
    refused(tokenizer, archives, out, "'k2': its labels differ")
    sidecar.write_text(before + "\n")  # another content with the same meaning
    assert make(tokenizer, archives, out).encoded == 0
    write_sidecar(archives / "a.tar", [{"key": "k1", "category": "sea"}])  # added
    refused(tokenizer, archives, out, "'k1': its labels differ")
    (archives / "a.scores.jsonl").unlink()

    kept = (archives / "a.tar").read_bytes()
    write_tar(archives / "a.tar", [{"__key__": f"k{n}", "png": image(9), "txt": b"image 0"} for n in (0,)])
    refused(tokenizer, archives, out, "'k0': its image differs")
    (archives / "a.tar").write_bytes(kept[:-2048])
    refused(tokenizer, archives, out, r"'byte \d+' is new|'k1'|more images after 'k1'")
    (archives / "a.tar").unlink()
    with pytest.raises(UserError, match="started with other images"):
        make(tokenizer, archives, out)


def test_an_archive_that_cannot_be_opened_is_left_to_the_encoder(tokenizer, archives, tmp_path, caplog):
    source, out = f"{archives}/{{a,b}}.tar", tmp_path / "out"
    started = [WorkUnit(0, part=0, parts=2), WorkUnit(1)]
    assert make(tokenizer, source, out, classes=["image"], per_shard=1, units=started).encoded == 3
    (archives / "a.tar").rename(tmp_path / "a.tar")
    summary = make(tokenizer, source, out, per_shard=1)
    assert (summary.encoded, summary.latents, len(summary.unreadable)) == (0, 2, 1)
    assert "a.tar: FileNotFoundError" in summary.unreadable[0]
    assert "a.tar cannot be opened (FileNotFoundError" in caplog.text
    (tmp_path / "a.tar").rename(archives / "a.tar")
    again = make(tokenizer, source, out, per_shard=1)
    assert (again.encoded, again.latents, again.unreadable) == (1, 4, [])


def test_an_index_that_cannot_be_read_is_one_line(tokenizer, index, tmp_path, monkeypatch):
    make(tokenizer, index, tmp_path / "out", units=[WorkUnit(0)])
    before = contents(tmp_path / "out")

    def fail(shards, number):
        raise UnreadableShard("[Errno 5] Input/output error")

    monkeypatch.setattr(image_files.IndexShards, "open", fail)
    for folder in ("out", "new"):
        with pytest.raises(
            UserError, match=r"^index\.jsonl, lines from 1: cannot be read \(.*output error\)"
        ):
            make(tokenizer, index, tmp_path / folder, classes=["sky"])
    assert contents(tmp_path / "out") == before
