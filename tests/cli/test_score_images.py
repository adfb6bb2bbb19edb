"""`cat-fast score` on images: pixels by default, captioners, failures by name, refused combinations."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from cat_fast.cli import score_loading
from cat_fast.complexity.image_scorers import loading as image_loading
from cat_fast.complexity.scorers import loading
from tests.cli.conftest import assert_one_line_error
from tests.complexity.scorers.stub_server import chat, serve


def rows(path: Path) -> list[dict]:
    return pyarrow.parquet.read_table(path).to_pylist()


def test_images_without_captions_are_scored_by_pixels(cat_fast, photos, tmp_path) -> None:
    (photos / "d.jpg").write_bytes(b"\xff\xd8 cut")
    out = photos / "s.parquet"  # among the images
    result = cat_fast("score", photos, "--out", out)
    assert result.exit_code == 1
    assert "no captions: the images are scored by their pixels, with --scorer image_student" in result.stderr
    assert "not scored: d.jpg: not an image" in result.stderr
    assert "failed: 1 of 4 images" in result.stderr
    found = rows(out)
    assert [row["key"] for row in found] == ["a.jpg", "b.png", "c.webp", "d.jpg"]
    assert [row["score"] is None for row in found] == [False, False, False, True]
    assert {row["scorer"].partition(" ")[0] for row in found} == {"image_student"}
    (photos / "d.jpg").unlink()
    assert "samples of" in cat_fast("score", photos, "--out", out).stderr  # one is missing now
    (photos / "d.jpg").write_bytes((photos / "b.png").read_bytes())
    assert cat_fast("score", photos, "--out", out).exit_code == 0


def test_jpeg_thresholds_decide_the_ratios(cat_fast, photos, tmp_path) -> None:
    report = tmp_path / "s.json"
    assert cat_fast("score", photos, "--scorer", "jpeg", "--json", report).exit_code == 0
    images = json.loads(report.read_text())["images"]
    sizes = [int(image["reasons"].split()[0]) for image in images]
    assert {image["ratio"] for image in images} == {32}
    a, b = sorted(sizes)[:2]
    command = ["score", photos, "--scorer", "jpeg", "--json", report, "--jpeg-thresholds", f"{a},{b}"]
    assert cat_fast(*command).exit_code == 0
    images = json.loads(report.read_text())["images"]
    by_size = dict(zip(sizes, (image["ratio"] for image in images), strict=True))
    assert [by_size[size] for size in sorted(sizes)] == [32, 16, 8]


def test_an_endpoint_describes_images_and_a_scorer_scores_them(cat_fast, photos, tmp_path) -> None:
    def answer(path: str, body: dict) -> dict:
        prompt = body["messages"][0]["content"][1]["text"]
        return chat(
            "A page of text." if prompt.startswith("Describe") else "Yes" if "text" in prompt else "No"
        )

    (photos / "b.txt").write_text("a caption that is kept")
    out = tmp_path / "s.parquet"
    with serve(answer) as server:
        command = ["score", photos, "--out", out, "--captioner", "endpoint", "--captioner-model", "m"]
        result = cat_fast(*command, "--captioner-url", f"{server.url}/v1", "--scorer", "fast")
    assert result.exit_code == 0, result.output
    assert [(row["caption"], row["has_text"], row["has_faces"]) for row in rows(out)] == [
        ("A page of text.", True, False),
        ("a caption that is kept", True, False),
        ("A page of text.", True, False),
    ]
    assert {row["scorer"].partition(" + ")[0] for row in rows(out)} == {"endpoint:m"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["photos", "--captioner", "eyes"], ["detectors, vlm, endpoint"]),
        (["photos", "--captioner", "vlm"], ["--captioner-model is missing"]),
        (["photos", "--captioner", "endpoint", "--captioner-model", "m"], ["--captioner-url is missing"]),
        (["photos", "--captioner", "vlm", "--scorer", "jpeg"], ["reads no description"]),
        (["photos", "--captioner", "detectors", "--captioner-model", "m"], ["not used", "vlm or endpoint"]),
        (["photos", "--scorer", "unified"], ["--captioner is missing"]),
        (["photos", "--scorer", "jpeg", "--model", "m"], ["--model", "not used by --scorer jpeg"]),
        (["photos", "--scorer", "jpeg", "--captioner-url", "http://x/v1"], ["--captioner-url"]),
        (["photos", "--scorer", "jpeg", "--no-text"], ["--no-text", "not used by --scorer jpeg"]),
        (["photos", "--scorer", "jpeg", "--device", "cuda"], ["--device", "not used by --scorer jpeg"]),
        (
            ["photos", "--scorer", "image_student", "--api-key-env", "KEY"],
            ["--api-key-env", "not used by --scorer image_student"],
        ),
        (["a cat", "--scorer", "jpeg"], ["reads images", "captions"]),
        (["a cat", "--jpeg-thresholds", "1,2"], ["--jpeg-thresholds", "not used"]),
        (["a cat", "--questions", "long"], ["--questions", "not used"]),
        (["photos", "--captioner", "vlm", "--captioner-model", "m", "--scorer", "best"], ["--scorer best"]),
        (["c.txt", "--captioner", "detectors"], ["contains no images"]),
    ],
)
def test_unusable_combinations_are_one_line(cat_fast, photos, monkeypatch, arguments, words) -> None:
    monkeypatch.chdir(photos.parent)
    Path("c.txt").write_text("a cat\n")
    assert_one_line_error(cat_fast("score", *arguments), *words)


@pytest.mark.parametrize(
    ("captioner", "given", "expected"),
    [
        ("vlm", {"escalate": 0.6}, {"device": "cuda:1"}),
        ("vlm", {"escalate": 0.6, "escalate_to": "endpoint"}, {"device": None}),
        ("vlm", {}, {"device": None}),
        ("endpoint", {"escalate": 0.6, "escalate_to": "endpoint"}, {"api_key_env": "KEY"}),
        ("endpoint", {}, {"api_key_env": None}),
    ],
)
def test_a_language_model_next_to_a_captioner_gets_device_and_key(
    monkeypatch, captioner, given, expected
) -> None:
    monkeypatch.setattr(loading, "load_scorer", lambda name, **keywords: keywords)
    monkeypatch.setattr(image_loading, "load_image_scorer", lambda captioner, scorer, load, *rest: load())
    names = (
        *("model", "base_url", "api_key_env", "prompt_file", "device", "batch_size", "escalate"),
        *("escalate_to", "captioner_model", "captioner_url", "captioner_template"),
        *("captioner_batch_size", "questions", "jpeg_thresholds", "has_text", "has_faces"),
    )
    options = dict.fromkeys(names) | {"device": "cuda:1", "api_key_env": "KEY"} | given
    found = score_loading.load_chosen(None, captioner, options, images=True)
    assert {name: found[name] for name in expected} == expected
