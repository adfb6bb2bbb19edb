"""The page in headless Chromium: drawing, reconstructions, keyboard, phone, dark mode, errors in words."""

import shutil

import pytest
from playwright import sync_api

from tests.inference.server.conftest import png

TIMEOUT = 60_000
"""In milliseconds."""

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")


@pytest.fixture(scope="module")
def browser():
    sync_api.expect.set_options(timeout=TIMEOUT)
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def page(browser, address):
    opened = browser.new_page(viewport={"width": 1100, "height": 900})
    opened.set_default_timeout(TIMEOUT)
    requested = []
    opened.on("request", lambda request: requested.append(request.url))
    opened.goto(address)
    sync_api.expect(opened.locator("#model")).to_contain_text("tiny")
    yield opened
    outside = [url for url in requested if not url.startswith((address, "data:", "blob:"))]
    opened.close()
    assert outside == []


def test_a_prompt_becomes_an_image_by_keyboard_alone(page):
    page.focus("#prompt")
    page.keyboard.type("a red house")
    page.fill("#steps", "6")
    page.focus("#prompt")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stage img[alt='a red house']")
    assert "tokens" in page.inner_text("#facts")
    page.wait_for_selector("#pack div")
    first = page.get_attribute("#stage img", "src")
    page.focus("#tokens")
    page.keyboard.press("End")  # the finest ratio: the same image with more tokens
    sync_api.expect(page.locator("#facts")).to_contain_text("8x")
    sync_api.expect(page.locator("#stage img[alt='a red house']")).not_to_have_attribute("src", first)


def test_errors_are_shown_in_words(page):
    page.fill("#prompt", "a red house")
    page.fill("#steps", "900")
    page.evaluate("document.getElementById('steps').value = 5000")
    page.evaluate("document.getElementById('generate').noValidate = true")
    page.click("#go")
    sync_api.expect(page.locator("#generate-error")).to_contain_text("1000")
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no image"})
    sync_api.expect(page.locator("#image-error")).to_contain_text("not an image")


def test_an_image_is_compared_with_its_reconstructions(page):
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": png()})
    page.wait_for_selector("#three figure:nth-child(3) img")
    assert page.locator("#three .chosen").count() == 1
    page.focus("#cut")
    page.keyboard.press("Home")
    assert page.evaluate("document.getElementById('three').style.getPropertyValue('--cut')") == "0%"
    assert "of 9" in page.inner_text("#image-facts")


def test_the_documentation_of_the_routes_loads_nothing_from_elsewhere(page, address):
    page.goto(f"{address}/docs")
    sync_api.expect(page.locator("#swagger-ui")).to_contain_text("/v1/images/generations")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_page_without_scrolling_sideways(browser, address, scheme):
    phone = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    phone.goto(address)
    assert phone.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    background = phone.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(251, 251, 250)" if scheme == "light" else "rgb(22, 24, 27)")
    phone.close()
