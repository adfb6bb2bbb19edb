"""The ranking page in headless Chromium: a participant's way through it, reloads, phones and dark mode."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from playwright import sync_api

from cat_fast.evaluation.ranking.page import find_sets, study_id, write_page
from cat_fast.evaluation.ranking.tally import tally

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
METHODS = ("best", "middle", "worst")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Three sets whose methods differ in size, so that a test can distinguish them."""
    folder = tmp_path_factory.mktemp("study")
    random = np.random.default_rng(0)
    for side, name in zip((64, 64, 48, 32), ("originals", *METHODS), strict=True):
        (folder / name).mkdir()
        for key in "abc":
            pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{key}.png")
    sets = find_sets(folder / "originals", {name: folder / name for name in METHODS})
    write_page(folder / "study.html", sets, "Which image is most similar to the original?")
    return folder / "study.html", study_id(sets)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


def opened(browser, path, **options):
    page = browser.new_page(**options)
    page.set_default_timeout(60_000)
    page.goto(path.as_uri())
    page.wait_for_function("[...document.images].every((image) => image.complete && image.naturalWidth)")
    return page


def rank(page, sides):
    """Select the images of a set by their sides."""
    for side in sides:
        widths = page.eval_on_selector_all(".choice img", "images => images.map((one) => one.naturalWidth)")
        page.locator(".choice").nth(widths.index(side)).click()


def test_a_participant_ranks_all_sets_and_the_saved_file_is_tallied(browser, study, tmp_path):
    path, identity = study
    page = opened(browser, path, viewport={"width": 1100, "height": 900}, accept_downloads=True)
    assert page.inner_text("#progress") == "Set 1 of 3; 0 ranked"
    assert page.is_disabled("#next")
    rank(page, [32, 48])
    assert page.is_disabled("#next")
    page.click("#clear")
    assert page.locator(".choice[aria-pressed=true]").count() == 0
    rank(page, [48, 64, 48, 32, 48])  # selecting 48 again removes its place
    assert page.locator(".place").all_inner_texts().count("") == 0
    page.click("#next")
    rank(page, [64, 48, 32])
    page.click("#back")
    assert page.inner_text("#progress") == "Set 1 of 3; 2 ranked"
    page.reload()  # nothing is lost
    assert page.inner_text("#progress") == "Set 1 of 3; 2 ranked"
    page.click("#next")
    page.click("#next")
    assert page.is_disabled("#save")
    page.locator(".choice").first.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")  # the focus has stayed: the place is removed again
    assert page.locator(".choice[aria-pressed=true]").count() == 0
    rank(page, [64, 32, 48])
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename in page.inner_text("#saved")
    download.value.save_as(tmp_path / "answers.json")
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert answers["study"] == identity
    assert sorted(one["key"] for one in answers["sets"]) == ["a", "b", "c"]
    rankings = sorted(one["ranking"] for one in answers["sets"])
    assert rankings == [["best", "middle", "worst"], ["best", "worst", "middle"], ["best", "worst", "middle"]]
    points = {
        name: figures["points"] for name, figures in tally([tmp_path / "answers.json"])["methods"].items()
    }
    assert points == pytest.approx({"best": 3, "middle": 4 / 3, "worst": 5 / 3})
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window_and_follows_the_colour_scheme(browser, study, width, scheme):
    page = opened(browser, study[0], viewport={"width": width, "height": 800}, color_scheme=scheme)
    root = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert root[0] <= root[1]
    colours = page.evaluate(
        "['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name])"
    )
    background, ink = (sum(int(part) for part in one[4:-1].split(",")) for one in colours)
    assert (background > ink) == (scheme == "light")
    boxes = [box.bounding_box() for box in page.locator("#original, .choice img").all()]
    assert all(box["width"] >= 100 for box in boxes)
    page.close()


def test_methods_are_shuffled_and_not_named(browser, study):
    orders = set()
    for _ in range(6):
        context = browser.new_context()
        page = opened(context, study[0])
        widths = page.eval_on_selector_all(".choice img", "images => images.map((one) => one.naturalWidth)")
        orders.add(tuple(widths))
        assert not any(name in page.inner_text("body").lower() for name in ("middle", "worst"))
        context.close()
    assert len(orders) > 1
