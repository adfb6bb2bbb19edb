"""The ranking page and its tally."""

import json
import re

import pytest
from PIL import Image

from cat_fast.errors import UserError
from cat_fast.evaluation.ranking.page import find_sets, study_id, write_page
from cat_fast.evaluation.ranking.tally import tally
from tests.cli.conftest import assert_one_line_error, cat_fast, parse_json  # noqa: F401 # a fixture


@pytest.fixture
def folders(tmp_path):
    """Originals a, b, c; methods one and two, of which the second lacks c and has other extensions."""
    for name, keys, suffix in (("originals", "abc", "png"), ("one", "abc", "png"), ("two", "ab", "jpg")):
        (tmp_path / name).mkdir()
        for number, key in enumerate(keys):
            Image.new("RGB", (8, 6), (40 * number, 10, 200)).save(tmp_path / name / f"{key}.{suffix}")
    return tmp_path


def sets(folders):
    return find_sets(folders / "originals", {"one": folders / "one", "<two>": folders / "two"})


def embedded(page):
    return json.loads(re.search(r'<script id="study"[^>]*>(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_every_set_and_nothing_from_elsewhere(folders):
    write_page(folders / "page.html", sets(folders), "Which one?")
    page = (folders / "page.html").read_text()
    study = embedded(page)
    assert [one["key"] for one in study["sets"]] == ["a", "b"]
    assert [method["name"] for method in study["sets"][0]["methods"]] == ["one", "<two>"]
    assert all(one["original"].startswith("data:image/png") for one in study["sets"])
    assert study["question"] == "Which one?"
    assert "http" not in page
    assert "<two>" not in page.replace(json.dumps(study), "")


def answer(path, person, *rankings, study="s"):
    content = [{"key": str(i), "ranking": list(ranking)} for i, ranking in enumerate(rankings)]
    path.write_text(json.dumps({"study": study, "participant": person, "sets": content}))
    return path


def test_points_are_three_two_and_one(tmp_path):
    files = [
        answer(tmp_path / "1.json", "p", "abc", "acb"),
        answer(tmp_path / "2.json", "q", "abc", "bac"),
    ]
    found = tally(files)
    points = {name: figures["points"] for name, figures in found["methods"].items()}
    assert points == {"a": 11 / 4, "b": 8 / 4, "c": 5 / 4}
    assert (found["participants"], found["sets"]) == (2, 2)
    low, high = found["methods"]["a"]["interval"]
    assert low <= 11 / 4 <= high


def test_unusable_answers_are_refused(tmp_path):
    good = answer(tmp_path / "1.json", "p", "abc")
    for other, words in (
        (answer(tmp_path / "2.json", "p", "abc"), "participant p has several files"),
        (answer(tmp_path / "3.json", "q", "abc", study="t"), "of study t"),
        (answer(tmp_path / "4.json", "q", "ab"), "expected a ranking of a, b, c"),
        (answer(tmp_path / "5.json", "q", "aab"), "expected a ranking of a, b, c"),
    ):
        with pytest.raises(UserError, match=words):
            tally([good, other])
    (tmp_path / "6.json").write_text("{")
    with pytest.raises(UserError, match="not a file of answers"):
        tally([tmp_path / "6.json"])


def test_folders_without_common_images_are_refused(folders):
    with pytest.raises(UserError, match="at least two methods"):
        find_sets(folders / "originals", {"one": folders / "one"})
    (folders / "other").mkdir()
    Image.new("RGB", (4, 4)).save(folders / "other" / "z.png")
    with pytest.raises(UserError, match="no image is in all folders"):
        find_sets(folders / "originals", {"one": folders / "one", "other": folders / "other"})
    found = sets(folders)
    assert study_id(found) != study_id(found[:1])


def test_commands(cat_fast, folders):  # noqa: F811
    methods = ["--method", f"one={folders / 'one'}", "--method", f"two={folders / 'two'}"]
    page = folders / "study.html"
    result = cat_fast("eval", "ranking", "--originals", folders / "originals", *methods, "-o", page)
    assert result.exit_code == 0, result.output
    assert "2 sets of 2 images" in result.stdout
    study = embedded(page.read_text())["study"]
    file = answer(folders / "answer.json", "p", ["one", "two"], study=study)
    assert parse_json(cat_fast("eval", "tally", file, "--json"))["methods"]["one"]["points"] == 2
    assert "mean points" in cat_fast("eval", "tally", file).stdout
    wrong = cat_fast("eval", "ranking", "--originals", folders / "originals", "--method", "one")
    assert_one_line_error(wrong, "expected NAME=DIR")
