"""Latent shards depend on the images only, not on processes or interruptions."""

import io
import json
import os
import pickle
import re
import shutil
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cat_fast.complexity import (
    Description,
    JpegThresholds,
    RatioThresholds,
    bulk_scorer,
    choose_ratio,
    default_thresholds,
)
from cat_fast.data.images.index import ImageRecord, write_index
from cat_fast.data.images.io import decode_image, image_to_tensor, resize_center_crop
from cat_fast.data.latents import reader
from cat_fast.data.latents.dataset import LatentDataset
from cat_fast.data.latents.moments import per_channel
from cat_fast.data.ratio_origin import RatioOrigin, ScoredBy
from cat_fast.data.shard_writer import IndexLines, write_shards
from cat_fast.data.streams.formats import image_files
from cat_fast.data.streams.formats.sidecar import write_sidecar
from cat_fast.errors import UserError
from cat_fast.inference.encoding.latent_shards import ShardEncoder
from cat_fast.inference.encoding.shard_plan import (
    DEFAULT_CLASSES,
    EncodeShardsSettings,
    EncodingSummary,
    WorkUnit,
    open_images,
    prepare_folder,
    summarize_finished,
    work_units,
)
from cat_fast.inference.encoding.tokenizer_identity import TokenizerIdentity
from tests.cli.conftest import tiny_tokenizer
from tests.data.streams.sets import image, write_tar

CATEGORIES = ("sky", "page", "street")
COUNT = 23


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Index of 23 images, with ten lines per input shard."""
    monkeypatch.setattr(image_files, "FILES_PER_SHARD", 10)
    folder = tmp_path / "in"
    folder.mkdir()
    records = []
    for n in range(COUNT):
        noise = np.random.default_rng(n).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((80, 70)).save(folder / f"{n:02d}.png")
        records.append(
            ImageRecord(
                key=f"a/key.{n:02d}",
                path=f"{n:02d}.png",
                caption=f"Straße {n}",
                has_text=False,
                has_faces=False,
                score=n % 9 + 1,
                ratio=(8, 16, 32)[n % 3],
                category=CATEGORIES[n % 3],
            )
        )
    write_index(folder / "index.jsonl", records)
    return folder / "index.jsonl"


@pytest.fixture
def archives(tmp_path):
    """Two archives of two samples each, with classes and captions in the archives and ratios in sidecars."""
    folder = tmp_path / "archives"
    for name, numbers in {"a": (0, 1), "b": (2, 3)}.items():
        samples = [
            {
                "__key__": f"{n}",
                "png": image(n, size=(80, 70)),
                "txt": f"Straße {n}".encode(),
                "cls": CATEGORIES[n % 3].encode(),
            }
            for n in numbers
        ]
        path = write_tar(folder / f"{name}.tar", samples)
        write_sidecar(path, [{"key": f"{n}", "ratio": 16} for n in numbers])
    return folder


def make(tokenizer, source, out, *, classes=None, units=None, **changes):
    """Encode a source in one process and return the summary."""
    settings = EncodeShardsSettings(
        source=str(source), out=out, **{"size": 64, "per_shard": 4, "batch_size": 2} | changes
    )
    images = open_images(settings.source, settings.image)
    names = prepare_folder(settings, images, TokenizerIdentity.of(tokenizer), classes)
    summary, units = summarize_finished(settings, units or work_units(0, 1, 1, len(images.names)))
    encoder = ShardEncoder(settings, images, tokenizer, names)
    for unit in units:
        summary.merge(encoder.run(unit))
    return summary


def raw_latents(folder):
    """Return {key: (unscaled latent, class name, ratio, caption)}; check that keys are unique."""
    data = LatentDataset(folder)
    found = {}
    for i, entry in enumerate(data.entries):
        assert entry.key not in found
        latent = data[i].latent / per_channel(data.scaling_factor) + per_channel(data.shift_factor)
        found[entry.key] = latent, data.class_names[entry.label], entry.ratio, entry.caption
    return found


def assert_complete(folder, tokenizer, index):
    found = raw_latents(folder)
    assert sorted(found) == [f"a/key.{n:02d}" for n in range(COUNT)]
    for n in range(COUNT):
        latent, category, ratio, caption = found[f"a/key.{n:02d}"]
        assert (category, ratio, caption) == (CATEGORIES[n % 3], (8, 16, 32)[n % 3], f"Straße {n}")
        image = decode_image((index.parent / f"{n:02d}.png").read_bytes())
        x = image_to_tensor(resize_center_crop(image, 64))[None]
        with torch.no_grad():
            expected = tokenizer.encode(x, ratio).latent_dist.mode()[0]
        torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-5)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", ["safetensors", "webdataset"])
def test_names_with_invalid_unicode_are_escaped(tokenizer, tmp_path, kind):
    folder = tmp_path / "in" / "caf\udce9"
    folder.mkdir(parents=True)
    for name in ("a\udce8.png", "a\udce9.png", "b.png"):
        (folder / name).write_bytes(image(1, size=(80, 70)) if name[0] == "a" else b"")
    tally = make(tokenizer, tmp_path / "in", tmp_path / "out", format=kind)
    assert [sample["key"] for sample in tally.skipped] == ["caf\udce9/b.png"]
    assert sorted(raw_latents(tmp_path / "out")) == [f"caf\\udce9/a\\udce{n}.png" for n in (8, 9)]
    assert make(tokenizer, tmp_path / "in", tmp_path / "out", format=kind).encoded == 0


@pytest.mark.parametrize("kind", ["safetensors", "webdataset"])
def test_every_image_is_encoded_once(tokenizer, index, tmp_path, kind):
    out = tmp_path / "out"
    summary = make(tokenizer, index, out, format=kind)
    assert_complete(out, tokenizer, index)
    assert (summary.latents, summary.encoded, summary.shards, summary.skipped) == (23, 23, 3 + 3 + 1, [])
    assert summary.ratios == {8: 8, 16: 8, 32: 7}
    assert summary.tokens == sum(LatentDataset(out).token_counts())
    assert LatentDataset(out, tokenizer.fingerprint()).class_names == sorted(CATEGORIES)
    with pytest.raises(UserError, match="expected latents of tokenizer another"):
        LatentDataset(out, "another")


def test_the_scale_of_the_tokenizer_is_recorded(index, tmp_path):
    tokenizer = tiny_tokenizer(scaling_factor=0.18215, shift_factor=0.5)
    make(tokenizer, index, tmp_path / "out")
    data = LatentDataset(tmp_path / "out", normalized="none")
    assert (data.shift_factor, data.scaling_factor) == ([0.5] * 4, [0.18215] * 4)
    assert len(data) == COUNT
    for i, entry in enumerate(data.entries):
        image = decode_image((index.parent / f"{entry.key[-2:]}.png").read_bytes())
        with torch.no_grad():
            x = image_to_tensor(resize_center_crop(image, 64))[None]
            encoded = tokenizer.encode(x, entry.ratio).latent_dist.mode()[0]
        torch.testing.assert_close(data[i].latent, (encoded - 0.5) * 0.18215, rtol=1e-4, atol=1e-5)


def test_webdataset_can_read_the_archives(tokenizer, index, tmp_path):
    make(tokenizer, index, tmp_path / "out", format="webdataset")
    expected = raw_latents(tmp_path / "out")
    assert len(expected) == COUNT
    for path in sorted((tmp_path / "out").glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            own = json.loads(sample["json"])
            latent, category, ratio, caption = expected.pop(own["key"])
            array = np.load(io.BytesIO(sample["npy"]))
            torch.testing.assert_close(torch.from_numpy(array), latent, rtol=1e-5, atol=1e-5)
            assert (own["ratio"], own["caption"], own["tokenizer"]) == (
                ratio,
                caption,
                tokenizer.fingerprint(),
            )
            assert sorted(CATEGORIES)[int(sample["cls"])] == category
    assert not expected


@pytest.mark.parametrize(("world_size", "workers"), [(2, 1), (1, 3), (3, 2)])
def test_any_number_of_ranks_and_workers_write_the_same_files(
    tokenizer, index, tmp_path, world_size, workers
):
    make(tokenizer, index, tmp_path / "one")

    def run() -> EncodingSummary:
        total = EncodingSummary()
        for rank in reversed(range(world_size)):
            units = work_units(rank, world_size, workers, 3)
            total.merge(make(tokenizer, index, tmp_path / "many", units=units))
        return total

    first, again = run(), run()
    assert first.encoded == first.latents == again.latents == COUNT
    assert again.encoded == 0
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20))
def test_work_is_divided_without_overlap_and_each_process_gets_some(world_size, workers, input_shards):
    units = [work_units(rank, world_size, workers, input_shards) for rank in range(world_size)]
    assert min(map(len, units)) >= workers
    pieces = Counter(
        (unit.input, number) for one in units for unit in one for number in range(unit.part, 30, unit.parts)
    )
    assert pieces == Counter(product(range(input_shards), range(30)))


def test_second_run_reads_no_image(tokenizer, index, tmp_path, monkeypatch):
    first = make(tokenizer, index, tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.setattr(image_files, "read_file", lambda *_: pytest.fail("read"))
    again = make(tokenizer, index, tmp_path / "out")
    assert (again.encoded, again.latents, again.ratios) == (0, COUNT, first.ratios)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("lost", ["record", "shard", "cut"])
def test_only_a_lost_shard_is_written_again(tokenizer, index, tmp_path, lost):
    out = tmp_path / "out"
    make(tokenizer, index, out)
    before = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    shard = out / "shard-000001-0001.safetensors"
    if lost == "cut":
        os.truncate(shard, 100)
    else:
        (shard if lost == "shard" else shard.with_suffix(".json")).unlink()
    for name in (shard.name, shard.with_suffix(".json").name):
        (out / f".{name}.0123abcd.part").write_bytes(b"half")
    assert make(tokenizer, index, out).encoded == 4
    assert contents(out) == before
    assert {p for p, at in times.items() if p.stat().st_mtime_ns != at} == {shard}
    assert_complete(out, tokenizer, index)


@pytest.mark.parametrize("kind", ["safetensors", "webdataset"])
def test_corrupted_shard_is_repaired_as_the_error_advises(tokenizer, index, tmp_path, kind):
    out = tmp_path / "out"
    make(tokenizer, index, out, format=kind)
    before = contents(out)
    shard = next(path for path in out.glob("shard-000001-0001.*") if path.suffix != ".json")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    data = LatentDataset(out)
    broken = next(i for i in range(COUNT) if data.entries.locate(i).shard == shard.name)
    with pytest.raises(UserError, match="its SHA-256 differs from its record") as error:
        data[broken]
    (advised,) = re.findall(r"delete (\S+) and encode again", str(error.value))
    os.unlink(advised)
    assert make(tokenizer, index, out, format=kind).encoded == 4
    assert contents(out) == before


def test_archive_is_indexed_once_even_if_opened_again(tokenizer, index, tmp_path, monkeypatch):
    make(tokenizer, index, tmp_path / "out", format="webdataset")
    data, members, searched = LatentDataset(tmp_path / "out"), reader.members, []

    def search(file):
        searched.append(file.name)
        return members(file)

    monkeypatch.setattr(reader, "members", search)
    monkeypatch.setattr(reader, "_MAX_OPEN_FILES", 1)
    first = [data[i].latent for i in range(COUNT)]
    for again in (data, pickle.loads(pickle.dumps(data))):
        for i in reversed(range(COUNT)):
            assert torch.equal(again[i].latent, first[i])
    assert len(searched) == len(set(searched)) == 7


def test_unfinished_folder_is_rejected(tokenizer, index, tmp_path):
    out = tmp_path / "out"
    make(tokenizer, index, out, units=[WorkUnit(0), WorkUnit(2)])
    message = "is incomplete: 2 of 3 input shards are encoded.*the same command again"
    with pytest.raises(UserError, match=message):
        LatentDataset(out)
    make(tokenizer, index, out)
    for piece in ("shard-000001-0000", "shard-000001-0001", "shard-000001-0002"):
        (out / f"{piece}.json").unlink()
        with pytest.raises(UserError, match=message):
            LatentDataset(out)
        make(tokenizer, index, out)
        assert_complete(out, tokenizer, index)


def test_folder_is_complete_even_if_all_images_of_an_input_shard_are_skipped(tokenizer, index, tmp_path):
    for n in range(10):
        (index.parent / f"{n:02d}.png").write_bytes(b"")
    summary = make(tokenizer, index, tmp_path / "out")
    assert len(summary.skipped) == 10
    assert len(LatentDataset(tmp_path / "out")) == COUNT - 10


def test_bad_samples_are_skipped_and_listed(tokenizer, index, tmp_path):
    (index.parent / "05.png").write_bytes((index.parent / "05.png").read_bytes()[:60])
    (index.parent / "06.png").unlink()
    lines = index.read_text().splitlines()
    lines[22] = "nonsense"
    index.write_text("\n".join(lines) + "\n")
    summary = make(tokenizer, index, tmp_path / "out")
    assert summary.latents == COUNT - 3
    assert [sample["key"] for sample in summary.skipped] == ["a/key.05", "a/key.06", "line 23"]
    assert "damaged" in summary.skipped[0]["why"]
    assert "No such file" in summary.skipped[1]["why"]
    assert make(tokenizer, index, tmp_path / "out").skipped == summary.skipped  # read from the records
    assert len(raw_latents(tmp_path / "out")) == COUNT - 3


def test_progress_includes_every_image(tokenizer, index, tmp_path):
    settings = EncodeShardsSettings(source=str(index), out=tmp_path / "out", size=64)
    images = open_images(settings.source)
    prepare_folder(settings, images, TokenizerIdentity.of(tokenizer))
    for _ in range(2):
        counts = {"found": 0, "done": 0}

        def on_progress(kind, images, counts=counts):
            counts[kind] += images

        encoder = ShardEncoder(settings, images, tokenizer, sorted(CATEGORIES))
        for unit in work_units(0, 1, 1, 3):
            encoder.run(unit, on_progress)
        assert counts == {"found": COUNT, "done": COUNT}


def test_archives_with_sidecars_give_the_same_latents_as_the_index(tokenizer, index, tmp_path):
    list(write_shards(IndexLines(index), tmp_path / "tars", per_shard=10, seed=0))
    make(tokenizer, tmp_path / "tars", tmp_path / "out")
    make(tokenizer, index, tmp_path / "direct")
    found, expected = raw_latents(tmp_path / "out"), raw_latents(tmp_path / "direct")
    assert len(found) == len(expected) == COUNT
    for key, (latent, *labels) in expected.items():
        other, *its = found[key.replace("/", "_").replace(".", "_")]
        assert its == labels
        torch.testing.assert_close(other, latent, rtol=1e-4, atol=1e-5)


def test_unreadable_archive_is_skipped_and_tried_again(tokenizer, index, tmp_path, caplog):
    list(write_shards(IndexLines(index), tmp_path / "tars", per_shard=10, seed=0))
    archive = tmp_path / "tars/shard-000001.tar"
    content = archive.read_bytes()
    archive.write_bytes(b"")
    summary = make(tokenizer, tmp_path / "tars", tmp_path / "out")
    assert summary.latents == 13
    assert "shard-000001.tar" in summary.unreadable[0]
    assert len(raw_latents(tmp_path / "out")) == 13
    assert "lacks 1 of 3 input shards, which could not be opened" in caplog.text
    assert "shard-000001.tar" in caplog.text
    caplog.clear()
    archive.write_bytes(content)
    assert make(tokenizer, tmp_path / "tars", tmp_path / "out").encoded == 10
    assert len(raw_latents(tmp_path / "out")) == COUNT
    assert "lacks" not in caplog.text
    make(tokenizer, tmp_path / "tars", tmp_path / "uninterrupted")
    assert contents(tmp_path / "out") == contents(tmp_path / "uninterrupted")


def test_folder_has_subfolders_as_classes_and_caption_files(tokenizer, index, tmp_path):
    folder = tmp_path / "images"
    for n in range(6):
        (folder / CATEGORIES[n % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(index.parent / f"{n:02d}.png", folder / CATEGORIES[n % 2])
    (folder / "page/01.txt").write_text("a newspaper page full of text")
    make(tokenizer, folder, tmp_path / "out")
    found = raw_latents(tmp_path / "out")
    assert {key: category for key, (_, category, _, _) in found.items()} == {
        f"{CATEGORIES[n % 2]}/{n:02d}.png": CATEGORIES[n % 2] for n in range(6)
    }
    chosen = choose_ratio(Description("a newspaper page full of text"), bulk_scorer()).ratio
    assert found["page/01.png"][2:] == (chosen, "a newspaper page full of text")
    assert found["page/03.png"][2:] == (32, None)  # a smooth image: a small JPEG


def test_captions_are_scored_in_one_batch_per_shard(tokenizer, index, tmp_path, monkeypatch):
    captions = ["a plane in the sky", "a newspaper page full of text", "a dog", "a crowd of faces", "a wall"]
    for n, caption in enumerate(captions):
        (index.parent / f"{n:02d}.txt").write_text(caption)
    scorer = type(bulk_scorer())
    batches, score_many = [], scorer.score_many

    def recorded(scorer, descriptions):
        batches.append([d.caption for d in descriptions])
        return score_many(scorer, descriptions)

    monkeypatch.setattr(scorer, "score_many", recorded)
    make(tokenizer, index.parent, tmp_path / "out", per_shard=4)
    assert batches == [captions[:4], captions[4:]]
    found = raw_latents(tmp_path / "out")
    for n, caption in enumerate(captions):
        assert found[f"{n:02d}.png"][2:] == (choose_ratio(Description(caption), bulk_scorer()).ratio, caption)


def test_images_without_classes_get_the_default_class(tokenizer, index, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(index.parent / "00.png", flat)
    make(tokenizer, flat, tmp_path / "out")
    assert LatentDataset(tmp_path / "out").class_names == DEFAULT_CLASSES


def test_other_classes_are_skipped_and_numeric_labels_are_indices(tokenizer, index, tmp_path):
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    lines[0]["category"] = "1"
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = make(tokenizer, index, tmp_path / "out", classes=["page", "sky"])
    assert {sample["why"] for sample in summary.skipped} == {"class 'street' is not one of the 2 classes"}
    assert raw_latents(tmp_path / "out")["a/key.00"][1] == "sky"


def test_numeric_class_names_are_not_indices(tokenizer, index, tmp_path):
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    for n, line in enumerate(lines):
        line["category"] = "1" if n == 0 else ("3", "5", "7")[n % 3]
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = make(tokenizer, index, tmp_path / "out", classes=["3", "5", "7"])
    assert summary.skipped == [{"key": "a/key.00", "why": "class '1' is not one of the 3 classes"}]
    assert raw_latents(tmp_path / "out")["a/key.01"][1] == "5"


def test_collected_class_names_are_sorted_as_numbers_or_text(tokenizer, index, tmp_path):
    lines = [
        json.loads(line) | {"category": ("b", "10", "2", "a")[n % 4]}
        for n, line in enumerate(index.read_text().splitlines())
    ]
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = EncodeShardsSettings(source=str(index), out=tmp_path / "out", size=64)
    names = prepare_folder(settings, open_images(settings.source), TokenizerIdentity.of(tokenizer))
    assert names == ["a", "b", "2", "10"]


def test_classes_are_read_from_archives_that_have_sidecars(tokenizer, archives, tmp_path):
    make(tokenizer, archives, tmp_path / "out")
    found = raw_latents(tmp_path / "out")
    assert {key: (category, ratio, caption) for key, (_, category, ratio, caption) in found.items()} == {
        f"{n}": (CATEGORIES[n % 3], 16, f"Straße {n}") for n in range(4)
    }


def test_error_names_the_archive_whose_classes_cannot_be_read(tokenizer, archives, tmp_path):
    (archives / "b.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.tar cannot be opened.*repair it, or list.*--classes"):
        make(tokenizer, archives, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    summary = make(tokenizer, archives, tmp_path / "out", classes=CATEGORIES)
    assert (summary.latents, len(summary.unreadable)) == (2, 1)


def test_ratios_follow_thresholds_or_are_fixed(tokenizer, index, tmp_path):
    pair = RatioThresholds(2, 5)
    make(tokenizer, index, tmp_path / "scores", thresholds=pair)
    assert [entry.ratio for entry in LatentDataset(tmp_path / "scores").entries] == [
        pair.ratio(n % 9 + 1) for n in range(COUNT)
    ]
    make(tokenizer, index, tmp_path / "fixed", ratio=32)
    assert set(LatentDataset(tmp_path / "fixed").entries.ratios.tolist()) == {32}


def test_origins_of_ratios_are_stored_with_the_latents(tokenizer, index, tmp_path):
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    by = {"scorer": "other", "version": "1", "thresholds": [2, 6]}
    for n, line in enumerate(lines):
        line.update({"scored_by": by if n < 9 else None, "ratio": None if n else 8})
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    other, applied = ScoredBy("other", "1", (2, 6)), default_thresholds()
    applied = (applied.a, applied.b)
    make(tokenizer, index, tmp_path / "out", format="webdataset")
    assert LatentDataset(tmp_path / "out").origins == {
        RatioOrigin(source="ratio", scored_by=other): 1,
        RatioOrigin(source="score", scored_by=other, thresholds=applied): 8,
        RatioOrigin(source="score", thresholds=applied): COUNT - 9,
    }
    header = json.loads((tmp_path / "out" / "latents.json").read_text())
    scorer = bulk_scorer()
    assert header["scored_by"] == {"scorer": scorer.name, "version": scorer.version, "thresholds": [*applied]}
    assert header["thresholds"] == [*applied]
    with pytest.raises(UserError, match="jpeg_thresholds"):
        make(tokenizer, index, tmp_path / "out", format="webdataset", jpeg_thresholds=JpegThresholds(1, 2))

    summary = make(tokenizer, index, tmp_path / "thresholds", thresholds=RatioThresholds(1, 2))
    assert {origin.thresholds for origin in summary.origins} == {(1, 2)}
    make(tokenizer, index.parent, tmp_path / "jpeg", jpeg_thresholds=JpegThresholds(0, 10**6))
    data = LatentDataset(tmp_path / "jpeg")
    assert data.origins == {RatioOrigin(source="jpeg size", jpeg_thresholds=(0, 10**6)): COUNT}
    assert set(data.entries.ratios.tolist()) == {16}
    make(tokenizer, index, tmp_path / "fixed", ratio=8)
    assert LatentDataset(tmp_path / "fixed").origins == {RatioOrigin(source="fixed"): COUNT}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 128}, "resolution: 64, not 128"),
        ({"per_shard": 5}, "latents_per_shard: 4, not 5"),
        ({"ratio": 16}, "ratio: 'auto', not 16"),
        ({"format": "webdataset"}, "format: 'safetensors'"),
        ({"classes": ["sky"]}, "class_names"),
    ],
)
def test_folder_with_other_settings_is_rejected(tokenizer, index, tmp_path, changes, message):
    make(tokenizer, index, tmp_path / "out")
    with pytest.raises(UserError, match=message):
        make(tokenizer, index, tmp_path / "out", **changes)
    with pytest.raises(UserError, match="fingerprint"):
        make(tiny_tokenizer(seed=1), index, tmp_path / "out")
    with index.open("a") as file:  # the set has grown
        file.write(index.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"started with other images: 'a/key\.00' is new; restore them"):
        make(tokenizer, index, tmp_path / "out")


def test_invalid_sources_and_settings_are_rejected(tokenizer, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_images(str(tmp_path / "none"))
    with pytest.raises(UserError, match="contains no image"):
        open_images(str(tmp_path))
    with pytest.raises(UserError, match="multiple of 64"):
        EncodeShardsSettings(source="photographs", out=tmp_path, size=100)
    with pytest.raises(UserError, match="'zip': expected safetensors or webdataset"):
        EncodeShardsSettings(source="photographs", out=tmp_path, format="zip")
