"""The photographs in the package: splits, captions, files, licences and the script that rebuilds them."""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from cat_fast.data.photographs import CATEGORIES, Photograph, photographs

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cat_fast" / "data" / "photographs"
FREE_LICENCES = {
    "CC0-1.0",
    "CC-BY-2.0",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC-BY-SA-3.0",
    "CC-BY-SA-4.0",
    "GPL-2.0-or-later",
    "LPPL",
    "LPPL-1.3c",
    "LicenseRef-public-domain",
}
# Correlation of 16 x 16 grey thumbnails: two different images have less than 0.83, copies more than 0.97.
DUPLICATE = 0.9


def records() -> dict[str, dict]:
    lines = (FOLDER / "photographs.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["key"]: record for record in map(json.loads, lines)}


@pytest.fixture
def collect() -> ModuleType:
    """Import the script that rebuilds the images."""
    spec = importlib.util.spec_from_file_location(
        "collect_photographs", ROOT / "scripts/collect_photographs.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_two_splits_make_up_all_photographs_and_eight_are_held_out() -> None:
    train, held_out = photographs("train"), photographs("held_out")
    assert len(held_out) == 8
    assert sorted(train + held_out, key=lambda photograph: photograph.key) == photographs()
    assert 44 <= len(photographs()) <= 56


def test_an_unknown_split_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"'test'.*train, held_out"):
        photographs("test")


def test_every_category_is_in_both_splits() -> None:
    for split in ("train", "held_out"):
        assert {photograph.category for photograph in photographs(split)} == set(CATEGORIES)


def test_flags_match_the_categories() -> None:
    shown = photographs()
    assert all(photograph.has_text for photograph in shown if photograph.category == "text")
    assert all(photograph.has_faces == (photograph.category == "face") for photograph in shown)
    assert not any(photograph.has_text for photograph in shown if photograph.category in ("sky", "texture"))
    assert sum(photograph.has_faces for photograph in shown) >= 4
    assert sum(photograph.category == "text" for photograph in shown) >= 6


def test_captions_are_one_sentence_each_and_all_different() -> None:
    captions = [photograph.caption for photograph in photographs()]
    assert len(set(captions)) == len(captions)
    for caption in captions:
        assert caption[0].isupper()
        assert caption.index(".") == len(caption) - 1
        assert 5 <= len(caption.split()) <= 25


def test_folder_contains_exactly_the_listed_files() -> None:
    listed = {photograph.path.name for photograph in photographs()}
    assert listed == {path.name for path in FOLDER.glob("*.jpg")}


def test_every_file_is_the_rgb_jpeg_that_the_list_describes() -> None:
    by_key = records()
    for photograph in photographs():
        record = by_key[photograph.key]
        assert hashlib.sha256(photograph.path.read_bytes()).hexdigest() == record["sha256"], photograph.key
        with Image.open(photograph.path) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert image.size == (record["width"], record["height"])


def test_image_and_package_sizes_are_within_limits() -> None:
    short_sides = [min(record["width"], record["height"]) for record in records().values()]
    assert min(short_sides) >= 360
    assert max(short_sides) <= 640
    assert sum(side >= 512 for side in short_sides) > 0.75 * len(short_sides)
    assert sum(photograph.path.stat().st_size for photograph in photographs()) <= 11e6


def test_held_out_photographs_share_no_source_with_training_ones() -> None:
    sources = {key: record["source"] for key, record in records().items()}
    used = {split: {place(sources[p.key]) for p in photographs(split)} for split in ("train", "held_out")}
    assert not used["train"] & used["held_out"]


def place(source: dict) -> tuple[str, str, int | None]:
    return source["package"], source["file"], source.get("page")


def test_no_held_out_photograph_looks_like_a_training_one() -> None:
    train = {photograph.key: thumbnail(photograph) for photograph in photographs("train")}
    for photograph in photographs("held_out"):
        held_out = thumbnail(photograph)
        likeness = {key: float(other @ held_out) for key, other in train.items()}
        closest = max(likeness, key=likeness.__getitem__)
        assert likeness[closest] < DUPLICATE, (photograph.key, closest)


@pytest.mark.parametrize("photograph", photographs("held_out"), ids=lambda photograph: photograph.key)
def test_a_recompressed_smaller_copy_would_be_noticed(photograph: Photograph, tmp_path: Path) -> None:
    with Image.open(photograph.path) as image:
        image.resize((image.width // 3, image.height // 3)).save(tmp_path / "copy.jpg", quality=40)
    with Image.open(tmp_path / "copy.jpg") as copy:
        assert signature(copy) @ thumbnail(photograph) > 0.97


def thumbnail(photograph: Photograph) -> np.ndarray:
    with Image.open(photograph.path) as image:
        return signature(image)


def signature(image: Image.Image) -> np.ndarray:
    """Return (256,) grey values with mean 0 and norm 1: the inner product of two is their correlation."""
    grey = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=np.float64).ravel()
    centred = grey - grey.mean()
    return centred / np.linalg.norm(centred)


def test_every_photograph_is_attributed_under_a_free_licence(collect: ModuleType) -> None:
    by_key = records()
    text = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert text == collect.attribution(list(by_key.values()))
    rows = {row.split("`")[1]: row for row in text.splitlines() if row.startswith("| `")}
    assert rows.keys() == by_key.keys()
    for key, record in by_key.items():
        assert set(record["licence"].split(" AND ")) <= FREE_LICENCES
        assert record["author"]
        cells = [cell.strip() for cell in rows[key].strip("|").split("|")]
        assert cells[1:3] == [record["author"], record["licence"]]
        assert f"{record['source']['package']} {record['source']['version']}" in cells[3]


def test_a_photograph_is_rebuilt_from_its_package(
    collect: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "PHOTOGRAPHS", tmp_path)
    package = tmp_path / "packages" / "wallpapers"
    package.mkdir(parents=True)
    ramp = np.linspace(0, 255, 1000, dtype=np.uint8)
    Image.fromarray(np.broadcast_to(ramp, (900, 1000))).save(package / "ramp.png")
    record = {
        "key": "ramp",
        "file": "ramp.jpg",
        "source": {"kind": "debian", "package": "wallpapers", "version": "1", "file": "ramp.png"},
        "crop": [200, 0, 1000, 800],
        "short_side": 400,
    }

    collect.rebuild(record, collect.package_folder(tmp_path / "packages", record["source"], download=False))

    assert (record["width"], record["height"]) == (400, 400)
    assert record["sha256"] == hashlib.sha256((tmp_path / "ramp.jpg").read_bytes()).hexdigest()
    with Image.open(tmp_path / "ramp.jpg") as image:
        assert image.mode == "RGB"
        columns = np.asarray(image.convert("L"), dtype=np.float64).mean(axis=0)
    np.testing.assert_allclose(columns, ramp[200:].reshape(400, 2).mean(axis=1), atol=2)


def test_an_image_is_never_enlarged_and_a_small_one_is_rejected(
    collect: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "PHOTOGRAPHS", tmp_path)
    record = {
        "key": "flat",
        "file": "flat.jpg",
        "source": {"file": "flat.png"},
        "crop": None,
        "short_side": 640,
    }
    Image.new("RGB", (500, 400)).save(tmp_path / "flat.png")
    collect.rebuild(record, tmp_path)
    assert (record["width"], record["height"]) == (500, 400)

    Image.new("RGB", (500, 300)).save(tmp_path / "flat.png")
    with pytest.raises(SystemExit, match="flat would be 500 x 300: under 360 px"):
        collect.rebuild(record, tmp_path)


def test_a_missing_package_is_reported_without_download(collect: ModuleType, tmp_path: Path) -> None:
    source = {"kind": "debian", "package": "wallpapers", "version": "1", "file": "ramp.png"}
    with pytest.raises(SystemExit, match="wallpapers there or add --download"):
        collect.package_folder(tmp_path, source, download=False)


@pytest.mark.skipif(shutil.which("pdftoppm") is None, reason="pdftoppm (poppler-utils) is not installed")
def test_a_page_of_a_pdf_is_rendered_at_its_resolution(collect: ModuleType, tmp_path: Path) -> None:
    # At 72 dpi one pixel of the image is one point of the page; the second page is black.
    first, second = Image.new("RGB", (200, 100), "white"), Image.new("RGB", (200, 100), "black")
    first.save(tmp_path / "pages.pdf", save_all=True, append_images=[second], resolution=72)
    page = collect.load(tmp_path / "pages.pdf", {"page": 2, "dpi": 144})
    assert (page.mode, page.size) == ("RGB", (400, 200))
    assert np.asarray(page).max() < 16
