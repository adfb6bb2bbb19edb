"""The report in a real browser, wide and narrow: every image is rendered and nothing overflows the page."""

import html
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")

WIDTHS = (1280, 400)
MEASURE = """<!doctype html><body>
%s
<script>
  const measure = frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const images = [...page.images];
    const isDrawn = p => p.complete && p.naturalWidth > 0 && p.getBoundingClientRect().width > 20;
    return {
      inner: root.clientWidth, outer: root.scrollWidth, height: root.scrollHeight,
      drawn: images.filter(isDrawn).length, images: images.length,
    };
  };
  window.onload = () => {
    document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(measure));
  };
</script>"""


def chromium(folder, page, *arguments: str) -> str:
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
        *("--disable-dev-shm-usage", "--allow-file-access-from-files", "--virtual-time-budget=10000"),
        *(f"--user-data-dir={folder / 'profile'}", *arguments, page.as_uri()),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_every_image_is_rendered_and_the_page_is_not_wider_than_the_window(miniature, tmp_path):
    # A frame can be as narrow as a phone's screen, a window cannot.
    frames = "\n".join(
        f'<iframe src="{miniature.report.as_uri()}" width="{width}" height="800" frameborder="0"></iframe>'
        for width in WIDTHS
    )
    page = tmp_path / "measure.html"
    page.write_text(MEASURE % frames)
    title = re.search(r"<title>(.*?)</title>", chromium(tmp_path, page, "--dump-dom"))
    assert title, "the page did not load"
    for width, seen in zip(WIDTHS, json.loads(html.unescape(title[1])), strict=True):
        assert width - 20 <= seen["inner"] <= width
        assert seen["outer"] <= seen["inner"], f"overflows at {width} px"
        assert seen["height"] > 800
        described = len(miniature.metrics["photographs"])
        images = described + 4 * len(miniature.results) + len(miniature.samples) + 2
        assert seen["drawn"] == seen["images"] == images


def test_screenshot_is_not_an_empty_page(miniature, tmp_path):
    image = tmp_path / "report.png"
    chromium(
        tmp_path, miniature.report, f"--screenshot={image}", "--window-size=1280,1600", "--hide-scrollbars"
    )
    shown = Image.open(image).convert("RGB")
    assert shown.size == (1280, 1600)
    colours = shown.getcolors(maxcolors=1 << 24)
    assert len(colours) > 1000
    assert max(count for count, _ in colours) < 0.9 * 1280 * 1600
