"""Flags that are missing or null stay unknown at every entry, so that the scorer infers them."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from cat_fast.complexity import Description, Score, read_descriptions
from cat_fast.complexity.ratios.image_ratios import score_records
from cat_fast.complexity.ratios.policy import RatioPolicy
from cat_fast.data.images.index import read_index, write_index
from cat_fast.data.shard_writer import IndexLines, write_shards
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.hugging_face import HubShards
from cat_fast.data.streams.formats.image_files import IndexShards
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.formats.sidecar import PARQUET, sidecar_url
from cat_fast.inference.encoding.photo_descriptions import PhotoDescriptions, read_photo_captions
from tests.data.streams.sets import image, tar_set, write_tar

FLAGS = {
    "missing": {},
    "null": {"has_text": None, "has_faces": None},
    "text": {"has_text": True, "has_faces": None},
    "no faces": {"has_faces": False},
}


LABELS = pyarrow.schema(
    [(name, pyarrow.string()) for name in ("key", "caption")]
    + [(name, pyarrow.bool_()) for name in ("has_text", "has_faces")]
)
IMAGE = pyarrow.field("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))


class Recorder:
    """Scorer that records what it is given."""

    name, version = "recorder", "1"

    def __init__(self):
        self.flags = {}

    def score_many(self, descriptions):
        self.flags |= {d.caption: (d.has_text, d.has_faces) for d in descriptions}
        return [Score.of_expected(5.0) for _ in descriptions]


def rows():
    """Return one object per case, whose name is its caption."""
    return [
        {"key": f"k{n}", "path": f"{n}.png", "caption": name, **flags}
        for n, (name, flags) in enumerate(FLAGS.items())
    ]


@pytest.fixture
def folder(tmp_path):
    """Write the rows as an image index, a captions file, and archives with JSON, sidecar lines and tables."""
    lines = "".join(json.dumps(row) + "\n" for row in rows())
    (tmp_path / "index.jsonl").write_text(lines)
    for row in rows():
        (tmp_path / row["path"]).write_bytes(image(1))
        (tmp_path / row["path"]).with_suffix(".txt").write_text(row["caption"])
    samples = [{"__key__": row["key"], "png": image(1)} for row in rows()]
    own = [s | {"json": json.dumps(row).encode()} for s, row in zip(samples, rows(), strict=True)]
    write_tar(tmp_path / "json" / "a.tar", own)
    for suffix in (".scores.jsonl", PARQUET):
        archive = str(write_tar(tmp_path / suffix / "a.tar", samples))
        if suffix == PARQUET:
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist(rows(), LABELS), sidecar_url(archive, suffix)
            )
        else:
            (tmp_path / suffix / "a.scores.jsonl").write_text(lines)
    (tmp_path / "hub").mkdir()
    table = [row | {"image": {"bytes": image(1), "path": None}} for row in rows()]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(table, LABELS.append(IMAGE)), tmp_path / "hub" / "a.parquet"
    )
    return tmp_path


def hub(path):
    return HubShards(str(path), "", "train", StreamConfig(first_wait=0.0), ProblemLog(), "")


def entries(shards):
    return [entry.labels for entry in shards.open(0).entries(0)]


def written_index(folder):
    write_index(folder / "copy.jsonl", read_index(folder / "index.jsonl"))
    return read_index(folder / "copy.jsonl")


def written_shards(folder):
    list(write_shards(IndexLines(folder / "index.jsonl"), folder / "shards", per_shard=9, seed=0))
    return entries(tar_set(folder / "shards"))


def captions_file(folder):
    return read_descriptions(folder / "index.jsonl")


def photo_captions(folder):
    found = read_photo_captions(folder / "index.jsonl")
    return [found.find(folder / f"{row['key']}.png") for row in rows()]


ENTRIES = {
    "index": lambda folder: read_index(folder / "index.jsonl"),
    "index on disk": lambda folder: entries(IndexShards(folder / "index.jsonl", ProblemLog(), score_records)),
    "written index": written_index,
    "written shards": written_shards,
    "webdataset json": lambda folder: entries(tar_set(folder / "json")),
    "sidecar lines": lambda folder: entries(tar_set(folder / ".scores.jsonl")),
    "sidecar table": lambda folder: entries(tar_set(folder / PARQUET)),
    "Hugging Face rows": lambda folder: entries(hub(folder / "hub")),
    "captions file": captions_file,
    "photo captions": photo_captions,
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_missing_and_null_flags_reach_the_scorer_as_unknown(entry, folder):
    images = entry(folder)
    expected = {name: (flags.get("has_text"), flags.get("has_faces")) for name, flags in FLAGS.items()}
    assert {one.caption: (one.has_text, one.has_faces) for one in images} == expected
    if not isinstance(images[0], Description):
        recorder = Recorder()
        RatioPolicy(("caption",), scorer=recorder).choose(images)
        assert recorder.flags == expected


def test_text_files_next_to_images_have_unknown_flags_unless_given(folder):
    photo = folder / "0.png"
    assert PhotoDescriptions().find(photo) == Description("missing")
    assert PhotoDescriptions(has_text=False).find(photo) == Description("missing", has_text=False)
    (folder / "a.txt").write_text("a street\n")
    assert read_descriptions(folder / "a.txt") == [Description("a street")]


def test_an_index_is_scored_with_unknown_flags(folder):
    recorder = Recorder()
    score_records(read_index(folder / "index.jsonl"), recorder)
    assert recorder.flags["missing"] == recorder.flags["null"] == (None, None)
