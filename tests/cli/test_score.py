"""`cat-fast score`: output, JSON file and error messages."""

import itertools
import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from cat_fast.cli.score import score
from cat_fast.complexity import (
    Description,
    RatioThresholds,
    default_scorer,
    default_thresholds,
)
from cat_fast.complexity.rated_captions import RATED_CAPTIONS, read_rated
from cat_fast.errors import UserError


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(score)
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})


def test_captions_are_listed_with_score_ratio_and_tokens(tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores.json"
    result = run("a plane in a clear sky", "a page of [bold] dense print", "--has-text", "--json", str(out))
    assert result.exit_code == 0, result.output
    assert "a page of [bold] dense print" in result.output
    assert "2 captions:" in result.output
    assert "against 256 at a fixed 16x" in " ".join(result.output.split())  # whatever the width
    written = json.loads(out.read_text())
    assert [image["caption"] for image in written["images"]] == [
        "a plane in a clear sky",
        "a page of [bold] dense print",
    ]
    thresholds = RatioThresholds(*written["thresholds"])
    assert thresholds == default_thresholds()
    assert (written["scorer"], written["version"]) == ("accurate", default_scorer().version)
    assert all(image["ratio"] == thresholds.ratio(image["score"]) for image in written["images"])
    assert all(image["has_text"] and not image["has_faces"] for image in written["images"])
    assert written["mean_tokens"] == sum(image["tokens"] for image in written["images"]) / 2


def test_packaged_captions_have_the_scores_of_the_packaged_scorer(tmp_path: Path) -> None:
    path = tmp_path / "written.jsonl"
    with (RATED_CAPTIONS / path.name).open(encoding="utf-8") as lines:
        path.write_text("".join(itertools.islice(lines, 200)), encoding="utf-8")
    result = run("--file", str(path), "--json", str(tmp_path / "scores.json"))
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "scores.json").read_text())
    assert [i["score"] for i in written["images"]] == [
        s.score for s in default_scorer().score_many([row.description for row in read_rated([path])])
    ]
    tokens = [image["tokens"] for image in written["images"]]
    assert written["mean_tokens"] == pytest.approx(sum(tokens) / len(tokens))


def test_captions_labels_and_files_are_combined_with_custom_thresholds(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("a dog on a lawn\n")
    result = run(
        "a cat",
        "--label",
        "golden retriever",
        "--file",
        str(tmp_path / "captions.txt"),
        "--thresholds",
        "0,0",
    )
    assert result.exit_code == 0, result.output
    for caption in ("a cat", "this is an image of golden retriever", "a dog on a lawn"):
        assert caption in result.output
    assert "8x 100%" in result.output
    assert "+300.0%" in result.output


def test_flags_apply_to_captions_labels_and_rows_without_their_own(tmp_path: Path) -> None:
    rows = [{"caption": "a"}, {"caption": "b", "has_text": False}, {"caption": "c", "has_faces": True}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = ["d", "--label", "e", "--file", str(tmp_path / "rows.jsonl")]
    out = tmp_path / "scores.json"
    for has_text, has_faces in ((True, None), (None, True), (False, True)):
        flags = ["--has-text"] * (has_text is True) + ["--no-text"] * (has_text is False)
        flags += ["--has-faces"] * bool(has_faces)
        assert run(*sources, *flags, "--json", str(out)).exit_code == 0
        images = json.loads(out.read_text())["images"]
        assert [(image["caption"], image["has_text"], image["has_faces"]) for image in images] == [
            ("d", has_text, has_faces),
            ("this is an image of e", has_text, has_faces),
            ("a", has_text, has_faces),
            ("b", False, has_faces),
            ("c", has_text, True),
        ]


def test_explain_shows_the_rubric_and_the_three_largest_effects() -> None:
    caption = "two flags on a roof"
    plain, explained = run(caption, "--has-text"), run(caption, "--has-text", "--explain")
    assert "out of 9" in explained.output
    assert "largest effects" in explained.output
    assert "out of 9" not in plain.output
    effects = default_scorer().contributions(Description(caption, has_text=True))
    wanted = ", ".join(f"{name} {value:+.2f}" for name, value in effects[:3])
    assert re.sub(r"\s", "", wanted) in re.sub(r"[\s│]", "", explained.output)  # whatever the width


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to score"),
        ([" "], "non-empty text"),
        (["a cat", "--thresholds", "7,4"], "0 <= a <= b <= 9"),
        (["a cat", "--thresholds", ""], "such as 4,7"),
        (["--file", "none.txt"], "cannot be read"),
    ],
)
def test_unusable_input_is_reported_on_one_line(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_help_has_examples() -> None:
    assert "cat-fast score --file captions.jsonl" in run("--help").output
