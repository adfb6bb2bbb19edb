"""Positional arguments of `cat-fast score`: files, captions, and what is refused."""

from pathlib import Path

import pytest

from cat_fast.complexity.scoring_run.arguments import split_arguments
from cat_fast.errors import UserError

EXISTING = ("a.jsonl", "b.TXT", "c.parquet", "d.tar", "e.tar.gz", "f.jpg", "g.PNG", "folder", "h.webp")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EXISTING:
        (tmp_path / name).mkdir() if name == "folder" else (tmp_path / name).touch()
    (tmp_path / "a cat").touch()
    (tmp_path / "scores.csv").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "missing")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", [*EXISTING, "folder/", "./a.jsonl"])
def test_existing_paths_with_a_known_ending_are_files(name: str) -> None:
    assert split_arguments([name]) == ([], [name])


@pytest.mark.parametrize(
    "text",
    [
        "a dog",
        "a dog. It sleeps.",
        "cost",
        "",
        " ",
        "a/b",
        "version 2.0",
        "a sign: www.example.com",
        "x" * 100_000,
        "nul \0 byte",
        "caf\udce9",
        "\ud83d",
        "看板 😀",
        "line one\nline two",
    ],
)
def test_texts_that_are_not_paths_are_captions(text: str) -> None:
    assert split_arguments([text]) == ([text], [])


@pytest.mark.parametrize(
    "arguments",
    [
        ["missing.jsonl"],
        ["missing.txt"],
        ["missing.parquet"],
        ["missing.tar"],
        ["missing.JPG"],
        ["missing/"],
        ["a page of readme.txt"],
        ["a cat"],  # an existing file without a known ending
        ["scores.csv"],
        ["broken"],
        ["a.jsonl", "a dog"],
        ["a dog", "folder"],
        ["a dog", "missing.txt"],
    ],
)
def test_ambiguous_arguments_are_refused_with_both_spellings(arguments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        split_arguments(arguments)
    assert "--caption TEXT" in str(caught.value)
    assert "--file PATH" in str(caught.value)
    assert "\n" not in str(caught.value)
