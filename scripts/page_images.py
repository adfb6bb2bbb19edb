"""Photograph the page of a running server for docs/inference.md.

    cat-fast serve --pipeline nano
    python scripts/page_images.py http://127.0.0.1:8000

docs/images/page_prompt.jpg shows a prompt while its image is drawn, among images of other clients;
docs/images/page_image.jpg an image with its reconstructions, in dark mode; docs/images/page_phone.jpg a
drawn image on a phone. Needs Chromium.
"""

import argparse
import json
import shutil
import sys
import threading
import urllib.request
from pathlib import Path

from playwright import sync_api

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs/images"
PROMPT, STEPS, SHOWN_AT = "red apple", 60, 45
OTHERS = (("penguin", 8), ("rainbow", 16), ("light bulb", 32), ("red heart", 16))
"""Prompts of other clients and their ratios."""
PHOTOGRAPH = ROOT / "cat_fast/data/photographs/astronaut.jpg"
DESCRIPTION = "A smiling astronaut in an orange space suit in front of an American flag."
QUALITY = 72
TIMEOUT = 120_000
"""In milliseconds."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("address", help="address of the server")
    address = parser.parse_args().address
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no chromium on PATH; install Debian's package chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        photograph_prompt(browser, address)
        photograph_image(browser, address)
        photograph_phone(browser, address)
        browser.close()


def photograph_prompt(browser: sync_api.Browser, address: str) -> None:
    """Draw a prompt next to those of other clients, and photograph the page before its last steps."""
    page = browser.new_page(viewport={"width": 1000, "height": 880})
    page.set_default_timeout(TIMEOUT)
    page.goto(address)
    page.fill("#prompt", PROMPT)
    page.fill("#steps", str(STEPS))
    page.fill("#seed", "7")
    others = [threading.Thread(target=draw, args=(address, *other)) for other in OTHERS]
    for other in others:
        other.start()
    page.focus("#prompt")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "least => { const mine = document.querySelector('#pack .mine');"
        " return mine && parseInt(mine.textContent) >= least"
        " && document.querySelectorAll('#pack div').length > 4; }",
        arg=SHOWN_AT,
    )
    page.screenshot(path=IMAGES / "page_prompt.jpg", type="jpeg", quality=QUALITY)
    for other in others:
        other.join()
    page.close()


def photograph_image(browser: sync_api.Browser, address: str) -> None:
    """Photograph the reconstructions of an image."""
    page = browser.new_page(viewport={"width": 760, "height": 900}, color_scheme="dark")
    page.set_default_timeout(TIMEOUT)
    page.goto(address)
    page.fill("#caption", DESCRIPTION)
    page.set_input_files("#file", PHOTOGRAPH)
    page.wait_for_selector("#three figure:nth-child(3) img")
    panel = page.locator("section[aria-labelledby=h-image]")
    panel.screenshot(path=IMAGES / "page_image.jpg", type="jpeg", quality=QUALITY)
    page.close()


def photograph_phone(browser: sync_api.Browser, address: str) -> None:
    """Draw a prompt on a phone, and photograph the image and its facts."""
    page = browser.new_page(viewport={"width": 390, "height": 700})
    page.set_default_timeout(TIMEOUT)
    page.goto(address)
    page.fill("#prompt", PROMPT)
    page.fill("#seed", "7")
    page.focus("#prompt")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"#stage img[alt='{PROMPT}']")
    page.evaluate("document.getElementById('go').scrollIntoView()")
    page.screenshot(path=IMAGES / "page_phone.jpg", type="jpeg", quality=QUALITY)
    page.close()


def draw(address: str, prompt: str, ratio: int) -> None:
    """Draw an image, as another client."""
    body = {"prompt": prompt, "ratio": ratio, "num_inference_steps": 2 * STEPS}
    request = urllib.request.Request(
        address + "/v1/images/generations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=TIMEOUT / 1000).read()


if __name__ == "__main__":
    main()
