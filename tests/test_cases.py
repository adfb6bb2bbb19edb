"""Every row of tests/cases/README.md, as its command meets it.

One section per kind of row; rows about archives and image indices are data (`ENCODED`, `INDICES`).
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner, Result

from cat_fast.cli.main import app
from cat_fast.complexity import read_descriptions
from cat_fast.complexity.ratios.image_ratios import load_index, score_records
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.image_files import IndexShards
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.errors import UserError
from cat_fast.inference.encoding.photo_descriptions import read_photo_captions
from tests.cli.conftest import tiny_tokenizer

CASES = Path(__file__).parent / "cases"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Folder of a saved tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def cat_fast(*args: object) -> Result:
    """Run `cat-fast ARGS...`; an exception other than an exit code fails the test."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], prog_name="cat-fast")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# --- archives and folders, encoded ---


class Latent(NamedTuple):
    key: str
    ratio: int
    caption: str | None = None
    category: str = "image"


@dataclass
class Encoded:
    """Result of `encode-shards`."""

    latents: list[Latent]
    exit_code: int = 0
    skipped: dict[str, str] | None = None
    """Part of the reported reason, by key."""


def encode_shards(source: Path, tokenizer: Path, out: Path) -> Encoded:
    result = cat_fast("encode-shards", source, "-c", tokenizer, "-o", out, "--size", 64, "--json")
    summary = json.loads(result.stdout)
    names = json.loads((out / "latents.json").read_text())["class_names"]
    latents = [
        Latent(found["key"], found["ratio"], found["caption"], names[found["label"]])
        for record in sorted(out.glob("shard-*.json"))
        for found in json.loads(record.read_text())["latents"]
    ]
    assert len(latents) == summary["latents"]
    skipped = {sample["key"]: sample["why"] for sample in summary["skipped_samples"]}
    return Encoded(latents, result.exit_code, skipped or None)


RED_SQUARES = [Latent(key, 16, "a red square") for key in ("000000", "000001")]
SQUARES = [Latent(f"k{n}", 16, "a square") for n in range(3)]
ENCODED = {
    "latin1_names.tar": Encoded([Latent("caf\\udce9", 16, "a red square")]),
    "surrogate.jsonl": Encoded([Latent("k0", 16, "nice \ufffd"), *SQUARES[1:]]),
    "half_sample.tar": Encoded(
        [Latent("a", 32, None, "0"), Latent("b", 32, None, "1")], 1, {"a": "has no class"}
    ),
    "duplicate_neighbours.tar": Encoded([Latent("000000", 32), Latent("000000-2", 8)]),
    "macos_folder.tar": Encoded([Latent("img/0", 8, None, "a"), Latent("img/1", 8, None, "a")]),
    "dot_slash.tar": Encoded(
        [Latent("000000", 8, "a red square", "a"), Latent("000001", 32, "a red square", "b")]
    ),
    "pax_global.tar": Encoded(RED_SQUARES),
    "multi_ext.tar": Encoded([Latent("000000", 32, "a red square"), Latent("000001", 32)]),
    "hardlink.tar": Encoded([Latent("000000", 16), Latent("000001", 16)]),
    "gz_named.tar": Encoded(RED_SQUARES),
    "json_bom.tar": Encoded([Latent("a", 8, "a red square", "3")]),
    "txt_bom.tar": Encoded([Latent("a", 32, "a red square", "3")]),
    "avif_heic.tar": Encoded([Latent("b", 32), Latent("c", 32), Latent("d", 16)]),
    "kinds_apart.tar": Encoded(
        [Latent(f"00000{n}", 32) for n in range(3)],
        1,
        {f"00000{n}": "its labels (json) are apart from its image" for n in range(3)},
    ),
    "plain.jsonl": Encoded(SQUARES),
    "bom.jsonl": Encoded(SQUARES),
    "blank_tail.jsonl": Encoded(SQUARES),
    "extra_field.jsonl": Encoded(SQUARES),
    "bool_str.jsonl": Encoded(
        SQUARES[2:],
        1,
        {"line 1": "line 1: has_text: expected true or false, got 'false'", "line 2": "score: expected an"},
    ),
}


@pytest.mark.parametrize("name", ENCODED)
def test_archives_and_indices_are_encoded(tokenizer, tmp_path, name):
    expected, found = ENCODED[name], encode_shards(CASES / name, tokenizer, tmp_path / "out")
    if name == "avif_heic.tar":  # not all builds of Pillow read AVIF
        found.latents = [latent for latent in found.latents if latent.key != "a"]
        assert found.exit_code in (0, 1)
        assert found.exit_code == 0 or "got avif" in found.skipped["a"]
    else:
        assert found.exit_code == expected.exit_code
        assert (found.skipped or {}).keys() == (expected.skipped or {}).keys()
    assert found.latents == expected.latents
    for key, why in (expected.skipped or {}).items():
        assert why in found.skipped[key]


def test_dots_in_a_key_are_named(tokenizer, tmp_path):
    archive = CASES / "dots_in_key.tar"
    result = cat_fast("encode-shards", archive, "-c", tokenizer, "-o", tmp_path / "out", "--size", 64)
    assert result.exit_code == 2
    assert "2 images in one sample (0.jpg, 5.jpg); a key ends at the first dot" in result.stderr
    command = ["encode-shards", archive, "-c", tokenizer, "-o", tmp_path / "chosen", "--size", 64]
    assert cat_fast(*command, "--image", "5.jpg").exit_code == 0


def test_a_class_folder_that_is_a_symbolic_link_is_followed(tokenizer, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(CASES / "p0.jpg", tmp_path / "elsewhere/p0.jfif")
    shutil.copy(CASES / "p1.jpg", tmp_path / "elsewhere/p1.jpe")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/cats").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "set")
    found = encode_shards(tmp_path / "set", tokenizer, tmp_path / "out")
    assert [(latent.key, latent.category) for latent in found.latents] == [
        ("cats/p0.jfif", "cats"),
        ("cats/p1.jpe", "cats"),
    ]


def test_a_struct_of_bytes_and_path_is_an_image():
    pytest.importorskip("datasets")
    from cat_fast.data.streams.formats.hugging_face import HubShards

    path = str(CASES / "parquet_without_hf_metadata")
    shards = HubShards(path, "", "train", StreamConfig(first_wait=0.0), ProblemLog())
    entries = list(shards.open(0).entries(0))
    assert [(entry.read()[:3], entry.damage) for entry in entries] == [(b"\xff\xd8\xff", "")] * 3
    assert all(entry.labels.score is not None for entry in entries)


# --- image indices and captions ---

INDICES = {
    "surrogate.jsonl": ["nice \ufffd", "a square", "a square"],
    "bom.jsonl": ["a square"] * 3,
    "blank_tail.jsonl": ["a square"] * 3,
    "extra_field.jsonl": ["a square"] * 3,
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_is_read_alike_by_all(tmp_path, name):
    """By `shard`, `data.index=` in memory and on disk; `ENCODED` has `encode-shards`."""
    assert [record.caption for record in load_index(str(CASES / name))] == INDICES[name]
    entries = list(IndexShards(CASES / name).open(0).entries(0))
    assert [(entry.labels.caption, entry.damage) for entry in entries] == [(c, "") for c in INDICES[name]]
    assert cat_fast("shard", CASES / name, "--out", tmp_path / "out").exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "out/shard-000000.scores.jsonl").open(encoding="utf-8")]
    assert sorted(row["caption"] for row in rows) == sorted(INDICES[name])


def test_flags_that_are_text_are_refused(tmp_path):
    """By all readers of captions; `ENCODED` has `encode-shards`."""
    index = CASES / "bool_str.jsonl"
    for read in (load_index, read_descriptions, read_photo_captions):
        with pytest.raises(UserError, match=r"line 1: has_text: expected true or false, got 'false'"):
            read(str(index) if read is load_index else index)
    damages = [entry.damage for entry in IndexShards(index, scoring=score_records).open(0).entries(0)]
    assert [bool(damage) for damage in damages] == [True, True, False]
    result = cat_fast("shard", index, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "expected true or false, got 'false'" in result.stderr


def test_a_lone_surrogate_is_scored():
    result = cat_fast("score", "--file", CASES / "lone_surrogate_caption.jsonl")
    assert result.exit_code == 0
    assert "nice \ufffd" in result.stdout


# --- single images ---


def test_long_text_in_a_png_is_read(tokenizer, tmp_path):
    out = tmp_path / "a.safetensors"
    result = cat_fast("encode", CASES / "ztxt_3MB.png", "-c", tokenizer, "-o", out, "--size", 64)
    assert result.exit_code == 0
    assert out.is_file()


def test_32_bit_grey_is_refused(tokenizer, tmp_path):
    out = tmp_path / "a.safetensors"
    result = cat_fast("encode", CASES / "int32.tif", "-c", tokenizer, "-o", out, "--size", 64)
    assert result.exit_code == 2
    assert "expected 8 or 16 bits per channel, got 32" in result.stderr
