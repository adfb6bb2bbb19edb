"""Runs on images: described or by pixels, resumed, shared, with unreadable images by name."""

import gc
import io
import json
import tarfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from cat_fast.complexity import Description, RatioThresholds, Score, ScoringFailure
from cat_fast.complexity.captioners.base import DescriptionFailure
from cat_fast.complexity.image_score import GivenLabels, ImageScore
from cat_fast.complexity.image_scorers.captioned import CaptionedScorer
from cat_fast.complexity.scoring_run.image_inputs import lack_captions, open_images
from cat_fast.complexity.scoring_run.outputs import Shard
from cat_fast.complexity.scoring_run.rows import CallSizes, ScoringResult
from cat_fast.complexity.scoring_run.run import score_set
from cat_fast.errors import UserError
from tests.complexity.scoring_run.stub import StubScorer, rows

SIZES = CallSizes(part=4, call=2)


class Brightness:
    """Scores images by the value of a pixel; records the values per call."""

    name, version = "brightness", "1"

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def prepare(self, image: Image.Image) -> Image.Image:
        return image.resize((1, 1))

    def score_images(
        self, images: Sequence[Image.Image], given: Sequence[GivenLabels]
    ) -> list[ImageScore | ScoringFailure]:
        values = [image.getpixel((0, 0))[0] for image in images]
        self.calls.append(values)
        return [
            ScoringFailure("too bright") if value > 250 else ImageScore(Score.of_expected(1 + value / 32))
            for value in values
        ]


def save(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (value,) * 3).save(path)
    return path


def score(out: Path, *files: Path | str, scorer=None, shard: Shard | None = None) -> ScoringResult:
    inputs = open_images([str(file) for file in files])
    thresholds = RatioThresholds(4, 7)
    return score_set(inputs, scorer or Brightness(), out, thresholds, shard=shard or Shard(), sizes=SIZES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(10):
        save(tmp_path / f"images/{i}.png", 20 * i)
    (tmp_path / "images/3.png").write_bytes(b"\x89PNG cut")
    return tmp_path / "images"


def test_images_are_scored_and_unreadable_ones_named(folder: Path, tmp_path: Path) -> None:
    out, scorer = tmp_path / "s.parquet", Brightness()
    result = score(out, folder, scorer=scorer)
    assert (result.noun, result.rows, result.scored, result.failed) == ("image", 10, 9, 1)
    found = rows(out)
    assert [row["key"] for row in found] == [f"{i}.png" for i in range(10)]
    assert [row["key"] for row in found if row["error"]] == ["3.png"]
    assert "not an image" in found[3]["error"]
    assert [row["score"] for row in found[:3]] == [1, 2, 2]
    assert found[0]["caption"] is found[0]["has_text"] is None
    assert all((row["source"] is None) == bool(row["error"]) for row in found)
    assert scorer.calls == [[0, 20], [40], [80, 100], [120, 140], [160, 180]]

    save(folder / "3.png", 60)
    again = Brightness()
    assert score(out, folder, scorer=again).failed == 0
    assert again.calls == [[60]]
    before = out.stat().st_mtime_ns
    assert score(out, folder, scorer=again).scored == 0
    assert out.stat().st_mtime_ns == before


def test_a_changed_image_is_refused_and_a_moved_one_is_not(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.parquet"
    score(out, folder)
    folder = folder.rename(tmp_path / "moved")
    inputs = open_images([str(folder)])
    assert [source.name for source in inputs] == ["moved"]
    save(folder / "5.png", 0)
    (tmp_path / "moved").rename(tmp_path / "images")
    with pytest.raises(UserError, match=r"'5\.png' has changed"):
        score(out, tmp_path / "images")
    save(tmp_path / "images/5.png", 100)
    score(out, tmp_path / "images")
    (tmp_path / "images/5.txt").write_text("a caption that a captioner would have kept")
    with pytest.raises(UserError, match=r"'5\.png' has changed"):
        score(out, tmp_path / "images")


def test_an_interrupted_run_resumes_and_shards_merge(folder: Path, tmp_path: Path) -> None:
    class Interrupted(Brightness):
        def score_images(self, images, given):
            if len(self.calls) == 3:
                raise KeyboardInterrupt
            return super().score_images(images, given)

    out, whole = tmp_path / "s.parquet", tmp_path / "whole.parquet"
    score(whole, folder)
    with pytest.raises(KeyboardInterrupt):
        score(out, folder, scorer=Interrupted())
    rest = Brightness()
    score(out, folder, scorer=rest)
    assert rest.calls == [[80, 100], [120, 140], [160, 180]]
    assert rows(out) == rows(whole)

    shared = tmp_path / "shared.parquet"
    for i in range(3):
        score(shared, folder, shard=Shard(i, 3))
    merged = Brightness()
    score(shared, folder, scorer=merged)
    assert merged.calls == []
    assert rows(shared) == rows(whole)


def test_only_the_images_of_a_call_are_in_memory(folder: Path, tmp_path: Path) -> None:
    class Tracking(Brightness):
        most = 0

        def __init__(self) -> None:
            super().__init__()
            self.prepared: list[weakref.ref[Image.Image]] = []

        def prepare(self, image: Image.Image) -> Image.Image:
            found = super().prepare(image)
            self.prepared.append(weakref.ref(found))
            return found

        def score_images(self, images, given):
            gc.collect()
            self.most = max(self.most, sum(image() is not None for image in self.prepared))
            return super().score_images(images, given)

    scorer = Tracking()
    score(tmp_path / "s.parquet", folder, scorer=scorer)
    assert 0 < scorer.most <= SIZES.call


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


class Describer:
    """Captioner that describes by the brightness; records the captions that it was given."""

    name, version = "describer", "1"

    def __init__(self, writes_captions: bool = True) -> None:
        self.writes_captions = writes_captions
        self.given: list[str | None] = []

    def describe_many(self, images, captions=None):
        self.given += captions
        return [
            DescriptionFailure("nothing seen")
            if image.getpixel((0, 0))[0] > 200 or not (caption or self.writes_captions)
            else Description(caption or f"grey {image.getpixel((0, 0))[0]}", True, False)
            for image, caption in zip(images, captions, strict=True)
        ]


def test_descriptions_keep_what_images_have(tmp_path: Path) -> None:
    png = {value: save(tmp_path / "x.png", value).read_bytes() for value in (10, 20, 30, 250)}
    archive = write_archive(
        tmp_path / "a.tar",
        {"0.png": png[10], "1.png": png[20], "1.json": b'{"caption": "given", "has_text": false}'}
        | {"2.png": png[30], "2.json": b'{"caption": "all", "has_text": false, "has_faces": true}'}
        | {"3.png": png[250]},
    )
    index = tmp_path / "index.jsonl"
    save(tmp_path / "y.png", 40)
    lines = [{"path": "y.png", "key": "y", "has_faces": True}, {"path": "missing.png", "caption": "one"}]
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    captioner, scorer = Describer(), StubScorer()
    out = tmp_path / "s.parquet"
    result = score(out, archive, index, scorer=CaptionedScorer(captioner, scorer))
    assert (result.rows, result.failed) == (6, 2)
    assert captioner.given == [None, "given", None, None]  # a complete description needs no captioner
    found = {row["key"]: row for row in rows(out)}
    described = {key: (row["caption"], row["has_text"], row["has_faces"]) for key, row in found.items()}
    assert described == {
        "a/0": ("grey 10", True, False),
        "a/1": ("given", False, False),
        "a/2": ("all", False, True),
        "a/3": (None, None, None),
        "index.jsonl/y": ("grey 40", True, True),
        "index.jsonl/missing.png": (None, None, None),
    }
    assert found["a/3"]["error"] == "not described: nothing seen"
    assert "No such file" in found["index.jsonl/missing.png"]["error"]
    assert found["a/0"]["scorer"].startswith("describer + stub ")


def test_detectors_take_the_class_as_caption(tmp_path: Path) -> None:
    save(tmp_path / "set/cat/a.png", 1)
    save(tmp_path / "set/b.png", 1)
    captioner = Describer(writes_captions=False)
    out = tmp_path / "s.parquet"
    score(out, tmp_path / "set", scorer=CaptionedScorer(captioner, StubScorer()))
    assert captioner.given == [None, "this is an image of cat"]


def test_images_without_captions_are_recognized(folder: Path, tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "a.tar", {"0.png": (folder / "0.png").read_bytes()})
    index = tmp_path / "index.jsonl"
    index.write_text('{"path": "images/0.png"}\n')
    assert lack_captions([str(folder), str(folder / "0.png"), str(archive), str(index)])
    captions = tmp_path / "c.jsonl"
    captions.write_text('{"path": "images/0.png", "caption": "a cat"}\n')
    assert not lack_captions([str(folder), str(captions)])
    assert not lack_captions([])
    (folder / "2.txt").write_text("a caption")
    assert not lack_captions([str(folder)])


def test_inputs_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("a cat\n")
    (tmp_path / "c.jsonl").write_text('{"caption": "a cat"}\n')
    for name, words in {"c.txt": "no images", "c.jsonl": "not an image index", "x.png": "No such"}.items():
        with pytest.raises(UserError, match=words):
            open_images([str(tmp_path / name)])
