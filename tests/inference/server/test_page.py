"""The page in headless Chromium: drawing, reconstructions, keyboard, phone, dark mode, errors in words."""

import re
import shutil
import time
from contextlib import ExitStack, contextmanager

import pytest
from playwright import sync_api
from playwright.sync_api import expect

from tests.inference.engine.mixes import tiny_pipeline
from tests.inference.server.conftest import TOKEN, listening, make_service, png

TIMEOUT = 60_000
"""In milliseconds."""
LOST = "The connection to the server was lost."
IMAGE_FILE = {"name": "x.png", "mimeType": "image/png", "buffer": png()}

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=TIMEOUT)
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@contextmanager
def opened(browser, address, **options):
    """Open the page within a block; fail if it requested anything from elsewhere, or if a script raised."""
    page = browser.new_page(**{"viewport": {"width": 1100, "height": 900}} | options)
    page.set_default_timeout(TIMEOUT)
    requested, raised = [], []
    page.on("pageerror", lambda error: raised.append(error.message))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(address)
    yield page
    page.close()
    assert [url for url in requested if not url.startswith((address, "data:", "blob:"))] == []
    assert raised == []


@pytest.fixture
def page(browser, address):
    with opened(browser, address) as page:
        expect(page.locator("#model")).to_contain_text("tiny")
        yield page


@pytest.fixture
def slow_steps(service):
    """Steps long enough to be watched; at the end, no request may be left."""
    service.engine.on_step = lambda _: time.sleep(0.01)
    yield
    deadline = time.monotonic() + TIMEOUT / 1000
    while service.engine.unfinished:
        assert time.monotonic() < deadline, "a request outlives the page that made it"
        time.sleep(0.01)
    service.engine.on_step = None


def press(page, key, *expected):
    """Press a key that moves the focus, once per id of an element that should get it."""
    for name in expected:
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.id") == name


def facts(page, name):
    """Return a list of facts as a dictionary."""
    names, values = (page.locator(f"#{name} {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def test_a_prompt_becomes_an_image_by_keyboard_alone(slow_steps, page):
    page.evaluate(
        """() => {
            window.shown = [];
            const stage = document.getElementById("stage");
            new MutationObserver(() => window.shown.push(stage.querySelector("img").alt))
                .observe(stage, {childList: true});
        }"""
    )
    press(page, "Tab", "prompt")
    page.keyboard.type("a red house")
    press(page, "Tab", "tokens", "steps")
    page.keyboard.type("24")  # replaces the selected default
    press(page, "Tab", "guidance", "seed")
    page.keyboard.type("5")
    press(page, "Tab", "go")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stage img[alt='a red house']")
    *previews, last = page.evaluate("window.shown")
    assert last == "a red house"
    steps = [int(preview.removeprefix("After step ")) for preview in previews]
    assert steps
    assert steps == sorted(steps)
    assert steps[-1] < 24
    found = facts(page, "facts")
    assert found["cost"].endswith("in 24 steps")
    assert found["seed"] == "5"
    first = page.get_attribute("#stage img", "src")
    press(page, "Shift+Tab", "seed", "guidance", "steps", "tokens")
    page.keyboard.press("End")  # the finest ratio: the same image with more tokens
    expect(page.locator("#facts")).to_contain_text("8x, 16 tokens, +300 % against fixed 16x")
    expect(page.locator("#stage img[alt='a red house']")).not_to_have_attribute("src", first)


def test_the_packed_step_shows_both_prompts_and_the_twin_until_one_is_cancelled(slow_steps, service, page):
    cancelled = service.engine.statistics.cancelled
    page.evaluate(
        """body => {
            const headers = {"Content-Type": "application/json"};
            fetch("v1/images/generations", {method: "POST", headers, body: JSON.stringify(body)});
        }""",
        {"prompt": "a blue sky", "num_inference_steps": 1000, "guidance_scale": 1},
    )
    page.fill("#prompt", "a red house")
    page.fill("#steps", "1000")
    page.fill("#guidance", "3")
    page.click("#go")
    page.wait_for_function(
        """() => {
            const boxes = kind => document.querySelectorAll("#pack div" + kind).length;
            return boxes(".mine:not(.twin)") === 1 && boxes(".mine.twin") === 1 && boxes(":not(.mine)") === 1
                && document.getElementById("pack-note").textContent.includes("2 images in 3 sequences");
        }"""
    )
    press(page, "Tab", "stop")
    page.keyboard.press("Enter")
    expect(page.locator("#generate-error")).to_have_text("Cancelled.")
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#pack .mine")).to_have_count(0)
    expect(page.locator("#pack div")).to_have_count(1)
    assert service.engine.statistics.cancelled == cancelled + 1


def test_errors_are_shown_in_words(page):
    page.fill("#prompt", "a red house")
    page.evaluate("document.getElementById('steps').value = 5000")
    page.evaluate("document.getElementById('generate').noValidate = true")
    page.click("#go")
    expect(page.locator("#generate-error")).to_contain_text("1000")
    page.set_input_files("#file", IMAGE_FILE | {"buffer": b"no image"})
    expect(page.locator("#image-error")).to_contain_text("not an image")


def test_a_dropped_image_is_scored_and_compared_with_its_reconstructions(page):
    dropped = page.evaluate_handle(
        """bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([Uint8Array.from(bytes)], "x.png", {type: "image/png"}));
            return transfer;
        }""",
        list(png()),
    )
    page.dispatch_event("#drop", "dragenter", {"dataTransfer": dropped})
    expect(page.locator("#drop")).to_have_class("drop over")
    page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})
    expect(page.locator("#drop")).to_have_class("drop")
    page.wait_for_selector("#three figure:nth-child(3) img")
    assert page.locator("#three .chosen").count() == 1
    found = facts(page, "image-facts")
    assert found["description"] == "none; the pixels were scored"
    expect(page.locator("#caption-note")).to_have_text("Without a description, the server scores the pixels.")
    assert re.fullmatch("[1-9] of 9", found["score"])
    assert re.fullmatch(r"\d+ %", found["confidence"])
    assert "lowered by textures and parts" in found["reasons"]
    tokens = int(re.fullmatch(r"\d+x, (\d+) tokens", found["ratio"])[1])
    saved = {16: r"\+300", 4: "±0", 1: "−75"}[tokens]
    assert re.fullmatch(rf"{saved} % tokens, [±+−]\d+ % FLOPs", found["against fixed 16x"])
    page.focus("#cut")
    page.keyboard.press("Home")
    assert page.evaluate("document.getElementById('three').style.getPropertyValue('--cut')") == "0%"
    page.focus("#caption")
    page.keyboard.type("a crowded street market with hundreds of people, signs and goods")
    page.keyboard.press("Tab")
    expect(page.locator("#image-facts")).to_contain_text('raised by word "')
    assert facts(page, "image-facts")["description"].startswith("a crowded street market")


def test_a_late_reply_does_not_replace_that_of_a_later_image(page):
    page.evaluate(
        """() => {
            const send = window.fetch;
            window.fetch = (url, options) => {
                if (!url.endsWith("reconstructions")) return send(url, options);
                window.fetch = send;
                const reply = {ok: false, status: 400, json: async () => ({error: {message: "late"}})};
                return new Promise(resolve => window.replyLate = () => resolve(reply));
            };
        }"""
    )
    page.set_input_files("#file", IMAGE_FILE)
    page.set_input_files("#file", IMAGE_FILE | {"name": "y.png"})
    page.wait_for_selector("#three figure:nth-child(3) img")
    page.evaluate("async () => { replyLate(); await new Promise(done => setTimeout(done)); }")
    assert page.locator("#image-error").inner_text() == ""
    assert page.is_visible("#compare-panel")


@pytest.fixture
def classes_with_token():
    made = make_service(tiny_pipeline(), token=TOKEN)
    yield made
    made.drain()


def test_a_server_with_a_token_draws_classes(browser, classes_with_token):
    with listening(classes_with_token) as address, opened(browser, address) as page:
        expect(page.locator("#model")).to_contain_text("token")
        press(page, "Tab", "token", "prompt")
        page.keyboard.type("a red house")
        page.keyboard.press("Enter")
        expect(page.locator("#generate-error")).to_contain_text("token")
        press(page, "Shift+Tab", "token")
        page.keyboard.type(TOKEN)
        press(page, "Tab", "prompt")
        expect(page.locator("#model")).to_contain_text("tiny, 64 px")
        expect(page.locator("#prompt-label")).to_have_text("Class name, such as 0, 1, 2")
        page.keyboard.press("Enter")
        expect(page.locator("#generate-error")).to_contain_text("the closest are")
        page.fill("#prompt", "1")
        page.fill("#steps", "3")
        page.click("#go")
        page.wait_for_selector("#stage img[alt='1']")
        expect(page.locator("#generate-error")).to_be_empty()


def test_a_lost_server_is_stated(slow_steps, browser, service):
    with ExitStack() as server, opened(browser, server.enter_context(listening(service))) as page:
        expect(page.locator("#model")).to_contain_text("tiny")
        page.fill("#prompt", "a red house")
        page.fill("#steps", "1000")
        page.click("#go")
        expect(page.locator("#facts")).to_contain_text("predicted")
        server.close()
        expect(page.locator("#generate-error")).to_have_text(LOST)
        expect(page.locator("#model")).to_have_text("The server does not answer.")
        page.set_input_files("#file", IMAGE_FILE)
        expect(page.locator("#image-error")).to_have_text(LOST)


def test_the_documentation_of_the_routes_loads_nothing_from_elsewhere(page, address):
    page.goto(f"{address}/docs")
    expect(page.locator("#swagger-ui")).to_contain_text("/v1/images/generations")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_page_without_scrolling_sideways(browser, address, scheme):
    options = {"viewport": {"width": 390, "height": 800}, "color_scheme": scheme}
    with opened(browser, address, **options) as phone:
        fits = "document.documentElement.scrollWidth <= window.innerWidth"
        assert phone.evaluate(fits)
        phone.fill("#prompt", "a red house")
        phone.fill("#steps", "3")
        phone.click("#go")
        phone.wait_for_selector("#stage img[alt='a red house']")
        phone.set_input_files("#file", IMAGE_FILE)
        phone.wait_for_selector("#three figure:nth-child(3) img")
        assert phone.evaluate(fits)
        background = phone.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(251, 251, 250)" if scheme == "light" else "rgb(22, 24, 27)")
