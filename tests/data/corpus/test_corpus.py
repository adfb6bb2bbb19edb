"""The corpus builder, on packages made on the spot."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from typer.testing import CliRunner

from cat_fast.cli.main import app
from cat_fast.data.corpus import build, packages
from cat_fast.data.corpus.build import build_corpus, split_of
from cat_fast.data.corpus.deb import unpack
from cat_fast.data.corpus.sources import SOURCES, clip_art, emoji, pages
from cat_fast.data.corpus.sources.base import CorpusImage
from cat_fast.data.images.index import read_index
from cat_fast.data.photographs import photographs
from cat_fast.errors import UserError


def png(colour, size=(96, 80)):
    data = io.BytesIO()
    Image.new("RGBA", size, colour).save(data, "PNG")
    return data.getvalue()


def scene(size=(300, 200)):
    data = io.BytesIO()
    Image.linear_gradient("L").resize(size).save(data, "PNG")
    return data.getvalue()


def write_deb(path: Path, files: dict[str, bytes], compression: str = "xz") -> Path:
    """Write a Debian package: an `ar` archive of debian-binary, control.tar and data.tar."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    members = [
        ("debian-binary", b"2.0\n"),
        ("control.tar", b"odd"),
        (f"data.tar.{compression}", data.getvalue()),
    ]
    archive = b"!<arch>\n"
    for name, content in members:
        header = f"{name + '/':<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        archive += header.encode() + content + b"\n" * (len(content) % 2)
    path.write_bytes(archive)
    return path


STAMPS = "usr/share/tuxpaint/stamps"
FILES = {f"{STAMPS}/animals/cat{i}.png": png((9 * i, 80, 200, 255)) for i in range(5)}
FILES |= {f"{STAMPS}/animals/cat{i}.txt": f"A cat, number {i}.\nde.utf8=Katze".encode() for i in range(4)}
FILES |= {f"{STAMPS}/broken.png": b"no image", f"{STAMPS}/broken.txt": b"A broken image."}


@pytest.fixture
def pin(tmp_path, monkeypatch):
    """Return a function that makes a package and pins it under the name of a real one."""
    given = tmp_path / "debs"
    given.mkdir()

    def pin(name: str, files: dict[str, bytes]) -> Path:
        path = write_deb(given / packages.PACKAGES[name].file, files)
        pinned = replace(packages.PACKAGES[name], sha256=sha256(path.read_bytes()).hexdigest())
        monkeypatch.setitem(packages.PACKAGES, name, pinned)
        return path

    pin.folder = given
    return pin


def test_a_source_becomes_two_indices_of_readable_images(tmp_path, pin):
    pin("tuxpaint-stamps-default", FILES)
    report = build_corpus(tmp_path / "out", given=pin.folder, only=["stamps"])
    records = [r for split in ("train", "held_out") for r in read_index(tmp_path / "out" / f"{split}.jsonl")]
    assert sorted(r.caption for r in records) == [f"A cat, number {i}" for i in range(4)]
    assert {r.category for r in records} == {"stamps/animals"}
    for record in records:
        assert Image.open(record.path).size == (96, 96)  # padded to a square
    assert sum(report.images["stamps"].values()) == 4
    assert "broken.png" in report.left_out
    assert json.loads((tmp_path / "out/corpus.json").read_text())["packages"] == {
        "tuxpaint-stamps-default": "2022.06.04-1"
    }
    assert not list((tmp_path / "out").glob(".unpacked*"))


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_package_that_is_gone_or_changed_is_left_out_by_name(tmp_path, pin, damage):
    pin("tuxpaint-stamps-default", FILES)
    path = pin("endless-sky-data", {"usr/share/games/endless-sky/images/land/sea1.jpg": png("red")})
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10] if damage == "cut" else path.read_bytes() + b"x")
    arguments = ["data", "corpus", "--out", str(tmp_path / "out"), "--from", str(pin.folder)]
    result = CliRunner().invoke(app, [*arguments, "--only", "stamps", "--only", "landscapes"])
    assert result.exit_code == 1
    assert "endless-sky-data" in result.stderr
    assert (
        len(read_index(tmp_path / "out/train.jsonl")) + len(read_index(tmp_path / "out/held_out.jsonl")) == 4
    )
    pin("endless-sky-data", {"usr/share/games/endless-sky/images/land/sea1.jpg": scene()})
    assert (
        CliRunner().invoke(app, [*arguments, "--only", "landscapes"]).exit_code == 1
    )  # broken.png stays out
    report = json.loads((tmp_path / "out/corpus.json").read_text())
    assert sum(report["images"]["landscapes"].values()) == 1
    assert sum(report["images"]["stamps"].values()) == 4
    assert list(report["left_out"]) == ["broken.png"]


def test_a_rerun_keeps_what_is_complete_and_rebuilds_what_was_cut_short(tmp_path, pin, monkeypatch):
    pin("tuxpaint-stamps-default", FILES)
    out = tmp_path / "out"

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(out, given=pin.folder, only=["stamps"])
    assert not (out / "train.jsonl").exists()
    monkeypatch.undo()
    (out / ".unpacked-killed/usr").mkdir(parents=True)  # of a build that was killed
    pin("tuxpaint-stamps-default", FILES)
    build_corpus(out, given=pin.folder, only=["stamps"])
    assert not list(out.glob(".unpacked*"))
    before = {p: p.stat().st_mtime_ns for p in (out / "images").rglob("*.png")}
    monkeypatch.setattr(build, "unpack", lambda *_: pytest.fail("a complete source is unpacked again"))
    build_corpus(out, given=pin.folder, only=["stamps"])
    assert {p: p.stat().st_mtime_ns for p in (out / "images").rglob("*.png")} == before


def test_without_apt_the_files_to_fetch_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(
        UserError, match=r"fonts-noto-color-emoji_2.042-0\+deb12u1_all.deb.*sha256:a5ab"
    ) as caught:
        build_corpus(tmp_path / "out", only=["emoji"])
    assert "--from" in str(caught.value)


def test_a_full_disk_is_reported_before_any_work(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr(build.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(build, "obtain", lambda *_: pytest.fail("downloads"))
    with pytest.raises(UserError, match=r"needs \d\.\d GB, but 0\.0 GB are free"):
        build_corpus(tmp_path / "out", given=tmp_path)


def test_a_download_that_fails_names_the_reason_of_apt(tmp_path, monkeypatch):
    script = tmp_path / "bin" / "apt-get"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nprint('E: Version 9 was not found')\nraise SystemExit(100)\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    with pytest.raises(packages.Unavailable, match="Version 9 was not found"):
        packages.obtain(packages.PACKAGES["lxqt-themes"], tmp_path / "packages")


def test_unpacking_follows_the_patterns_and_never_leaves_the_folder(tmp_path):
    deb = write_deb(tmp_path / "a.deb", {"usr/a.png": b"1", "usr/b.txt": b"2", "../evil.png": b"3"}, "gz")
    assert unpack(deb, tmp_path / "x", ["usr/*.png"]) == 1
    assert (tmp_path / "x/usr/a.png").read_bytes() == b"1"
    with pytest.raises(ValueError, match="not a readable Debian package"):
        unpack(deb, tmp_path / "x", ["*"])
    assert not (tmp_path / "evil.png").exists()
    for content in (b"", b"!<arch>\n", b"PK"):
        (tmp_path / "b.deb").write_bytes(content)
        with pytest.raises(ValueError, match=r"b\.deb"):
            unpack(tmp_path / "b.deb", tmp_path / "x", ["*"])


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
def test_a_package_of_dpkg_is_unpacked(tmp_path):
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: a\n"
    )
    (root / "usr").mkdir()
    (root / "usr/a.png").write_bytes(b"1")
    subprocess.run(["dpkg-deb", "-b", str(root), str(tmp_path / "a.deb")], check=True, capture_output=True)
    assert unpack(tmp_path / "a.deb", tmp_path / "x", ["usr/*"]) == 1


def test_variants_of_an_emoji_share_a_split():
    families = [
        ["🏃", "🏃🏽", "🏃‍♀", "🏃🏿‍♂"],
        ["👩‍⚕", "👨‍⚕", "🧑‍⚕", "👩🏽‍⚕"],
        ["👩", "👨", "🧑", "👩🏽"],
        ["👍", "👍🏿"],
    ]
    bases = [{emoji.group_of(text) for text in family} for family in families]
    assert all(len(groups) == 1 for groups in bases)
    assert len(set.union(*bases)) == len(families)
    assert emoji.group_of("🇫🇷") != emoji.group_of("🇫🇮")


def test_the_held_out_share_is_one_in_twenty_and_fixed():
    splits = [split_of("emoji", chr(code)) for code in range(0x1F300, 0x1F700)]
    assert 0.03 < splits.count("held_out") / len(splits) < 0.07
    assert [split_of("emoji", text) for text in "🍎🍏🐱🚀"] == [
        split_of("emoji", text) for text in "🍎🍏🐱🚀"
    ]
    assert split_of("pages", "hyperref-manual") == "train"


def test_clip_art_captions_leave_out_authors_and_numbers(tmp_path):
    path = tmp_path / "usr/share/openclipart/png/animals/dinosaurs/dino_architetto_francesc_02.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(png("green", (300, 300)))
    (image,) = clip_art.CLIP_ART.images(tmp_path, pytest.fail)
    assert isinstance(image, CorpusImage)
    assert image.caption == "dino, clip art of dinosaurs"
    assert image.image.size == (256, 256)
    names = ["black_sheep_jon_phillips_01", "io_donna_architetto_fr_", "signalflag_mike", "tv_bw_02"]
    assert [" ".join(clip_art.caption_words(name)) for name in names] == [
        "black sheep",
        "donna",
        "signalflag mike",
        "tv",
    ]


def test_clip_art_is_cropped_and_leaves_out_copies_icons_and_huge_pages(tmp_path, monkeypatch):
    folder = tmp_path / "usr/share/openclipart/png"
    page = Image.new("RGB", (800, 1000), "white")
    page.paste("red", (300, 300, 420, 400))
    page.paste("blue", (330, 320, 380, 390))
    for name, drawing in {
        "food/apple_01": page,
        "food/apple-md": page.resize((400, 500)),
        "computer/icons/apple": page.rotate(90),
        "food/huge": page.rotate(180).resize((1500, 1500)),
        "food/white": Image.new("RGB", (200, 200), "white"),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        drawing.save(folder / f"{name}.png")
    monkeypatch.setattr(clip_art, "_MAX_PIXELS", 10**6)
    problems = {}
    (image,) = clip_art.CLIP_ART.images(tmp_path, problems.__setitem__)
    assert list(problems) == ["huge.png"]
    assert image.caption == "apple, clip art of food"
    box = ImageChops.invert(image.image).getbbox()
    assert box[2] - box[0] > 0.85 * image.image.width


def test_wallpapers_leave_out_logos_plain_ones_sizes_and_shipped_photographs(tmp_path):
    folder = tmp_path / "mate-backgrounds/usr/share/backgrounds"
    shipped = tmp_path / "plasma-workspace-wallpapers/usr/share/wallpapers/summer_1am/contents/images"
    gradient = Image.linear_gradient("L")
    for path, image in {
        folder / "Elephants_1920x1080.png": gradient.resize((600, 500)),
        folder / "Elephants_3840x2160.png": gradient.resize((900, 700)),
        folder / "Gulp.png": Image.new("RGB", (600, 600), "white"),
        folder / "MATE-Stripes-Dark.png": gradient.resize((600, 600)),
        shipped / "2560x1600.jpg": gradient.resize((600, 600)),
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    assert [image.name for image in SOURCES["wallpapers"].images(tmp_path, pytest.fail)] == ["Elephants"]


def test_pages_become_crops_of_text_at_full_resolution():
    page = Image.new("L", (1700, 2200), 255)
    for y in range(400, 1700, 30):
        for x in range(300, 1300, 20):
            page.paste(0, (x, y, x + 8, y + 12))
    crops = pages._crops(page)
    assert [crop.size for crop in crops] == [(pages.SIDE, pages.SIDE)] * 3
    for crop in crops:
        assert 0.04 < crop.convert("L").histogram()[0] / pages.SIDE**2 < 0.3
    assert pages._crops(Image.new("L", (1700, 2200), 255)) == []


def test_shipped_photographs_keep_their_split_and_count_several_times(tmp_path):
    report = build_corpus(tmp_path, given=tmp_path, only=["photographs"])
    assert report.images["photographs"] == {"train": 48, "held_out": 8}
    assert len(read_index(tmp_path / "held_out.jsonl")) == 8
    keys = [record.key for record in read_index(tmp_path / "train.jsonl")]
    repeats = SOURCES["photographs"].repeats
    assert len(keys) == len(set(keys)) == 48 * repeats
    assert f"photographs/{photographs('train')[0].key}~{repeats}" in keys


def test_every_source_names_known_packages():
    for source in SOURCES.values():
        assert set(source.packages) <= set(packages.PACKAGES)
    with pytest.raises(UserError, match="expected one of emoji"):
        build_corpus(Path("x"), only=["emojis"])
