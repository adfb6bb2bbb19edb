"""The English of comments, docstrings, messages and documents keeps to the words of the field."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def language():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("check_language")


def test_the_project_contains_no_banned_word(language):
    texts = list(language.texts_of(ROOT, list(language.SCOPE)))
    assert language.count_words(texts) > 50_000
    assert [str(match) for match in language.find_banned(texts)] == []


def test_the_project_keeps_the_rates(language):
    texts = list(language.texts_of(ROOT, list(language.SCOPE)))
    words = language.count_words(texts)
    above = {
        rule: [str(match) for match in matches]
        for rule, matches in language.find_rated(texts).items()
        if 1e4 * len(matches) > language.RATES[rule][1] * words
    }
    assert above == {}


def test_every_exception_is_needed_and_has_a_reason(language, monkeypatch):
    exceptions = dict(language.EXCEPTIONS)
    monkeypatch.setattr(language, "EXCEPTIONS", {})
    found = language.find_banned(list(language.texts_of(ROOT, list(language.SCOPE))))
    assert set(exceptions) <= {(str(match.path), match.found.lower()) for match in found}
    assert all(len(reason.split()) > 2 for reason in exceptions.values())


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("comment.py", "x = 1\n# what it was told\n", 2),
        ("wrapped.py", "# the run goes\n# on from there\n", 1),
        ("message.py", "raise ValueError(\n    f'{x} was begun anew'\n)\n", 2),
        ("docstring.py", 'def f():\n    """What is returned."""\n', 2),
        ("class.py", 'class A:\n    """Numbers.\n\n    Nobody reads them.\n    """\n', 4),
        ("field.py", 'class A:\n    x: int\n    """As it was told."""\n', 3),
        ("op.cpp", "int x;\n// nobody calls it\n", 2),
        ("kernel.cuh", 'int y;\n/* nothing\n   goes on */ auto s = "x";\n', 3),
        ("error.h", 'CHECK(x,\n  "the rank is told")\n', 2),
        ("run.yaml", "a: 1  # told elsewhere\n", 1),
        ("launch.sh", '#!/bin/sh\necho "it goes on"\n', 2),
        ("doc.md", "# Title\n\nSome text\nwhich goes on.\n", 4),
        ("page.html", "<p>\n<b>Nobody</b> asked</p>", 2),
    ],
)
def test_a_banned_word_is_found_with_its_line(language, tmp_path, name, text, line):
    (tmp_path / name).write_text(text)
    found = language.find_banned(list(language.texts_of(tmp_path, [name])))
    assert found
    assert str(found[0]).startswith(f"{name}:{line}: ")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("name.py", "told = tell\nx = {'told': 1}\n"),
        ("quoted.md", "Use `tell` and\n```\ntold\n```\nthen [a link](docs/told.md).\n"),
        ("quoted.py", '"""Return the value of `told`."""\n'),
        ("code.cpp", "auto told = goes_on(nobody);\n"),
        ("page.html", "<style>.told { x: y }</style><p class='told'>text</p>"),
        ("whatever.py", '"""Whatever is asked, retold and beholden."""\n'),
    ],
)
def test_code_is_left_out(language, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert language.find_banned(list(language.texts_of(tmp_path, [name]))) == []


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("say(s)", "The config says so."),
        ("beside(s)", "a file beside it"),
        ("is/are no X", "These are no images."),
        ("picture", "a picture"),
        ("what is/it/the/a", "decides what it does"),
        ("a step, for per", "two collectives a step"),
        ("lie(s)", "files lie there"),
        ("how many", "how many images"),
    ],
)
def test_rated_phrases_are_counted(language, tmp_path, rule, text):
    (tmp_path / "doc.md").write_text(text)
    found = language.find_rated(list(language.texts_of(tmp_path, ["doc.md"])))
    assert [name for name, matches in found.items() if matches] == [rule]
