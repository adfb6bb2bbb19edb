"""Draw the images of the README from a finished demo of the shipped models.

    cat-fast demo --out runs/demo
    python scripts/readme_images.py runs/demo

docs/images/demo.jpg shows held-out photographs with their reconstructions, the chosen one framed, and
docs/images/samples.jpg prompts at three token counts. docs/demo.json holds the metrics of that run.
"""

import argparse
import base64
import io
import json
import re
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).parents[1] / "docs"
PHOTOGRAPHS = ("astronaut", "cat", "font_package_table", "calm_lake_at_dusk")
"""Keys of the photographs shown: a face, an animal, text, a sky."""
PROMPTS = ("smiling face with sunglasses", "red apple", "light bulb", "red heart", "rainbow", "penguin")
SIDE, GAP, TEXT = 236, 8, 15
FRAMES = {"8": "#c2410c", "16": "#0369a1", "32": "#4d7c0f"}
"""Colours of the report."""
QUALITY = 78


def main() -> None:
    """Read the report, write the images and the metrics."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="output folder of `cat-fast demo`")
    demo = parser.parse_args().demo
    metrics = json.loads((demo / "shipped.json").read_text(encoding="utf-8"))
    images = read_images(demo / "report.html")
    ratios = list(metrics["tokens"])
    photographs, rest = images[: 4 * len(metrics["photographs"])], images[4 * len(metrics["photographs"]) :]
    draw_photographs(metrics, photographs, ratios).save(DOCS / "images/demo.jpg", quality=QUALITY)
    draw_samples(metrics, rest, ratios).save(DOCS / "images/samples.jpg", quality=QUALITY)
    (DOCS / "demo.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def read_images(report: Path) -> list[Image.Image]:
    """Return the embedded images of a report in their order."""
    found = re.findall(r'src="data:image/\w+;base64,([^"]+)"', report.read_text(encoding="utf-8"))
    return [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in found]


def draw_photographs(metrics: dict, images: list[Image.Image], ratios: list[str]) -> Image.Image:
    """Return rows of original and reconstructions, under a line with caption and score."""
    keys = [photo["key"] for photo in metrics["photographs"]]
    row_height = SIDE + 3 * TEXT
    sheet = Image.new("RGB", (4 * (SIDE + GAP) - GAP, len(PHOTOGRAPHS) * row_height + 2 * TEXT), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(["original", *(f"{f}x" for f in ratios)]):
        draw.text((column * (SIDE + GAP), 0), name, "black", ImageFont.load_default(TEXT))
    for row, key in enumerate(PHOTOGRAPHS):
        number, top = keys.index(key), 2 * TEXT + row * row_height
        photo = metrics["photographs"][number]
        text = f"“{photo['caption']}” score {photo['score']} of 9: {photo['ratio']}x"
        draw.text((0, top), text, "black", ImageFont.load_default(TEXT))
        for column in range(4):
            image = images[4 * number + column].resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            corner = (column * (SIDE + GAP), top + int(1.5 * TEXT))
            sheet.paste(image, corner)
            if column and ratios[column - 1] == str(photo["ratio"]):
                frame(draw, corner, SIDE, FRAMES[ratios[column - 1]])
    return sheet


def draw_samples(metrics: dict, images: list[Image.Image], ratios: list[str]) -> Image.Image:
    """Return a row per token count and a column per prompt."""
    side, left = 152, 84
    texts = [prompt["text"] for prompt in metrics["prompts"]]
    height = 3 * TEXT + len(ratios) * (side + GAP) - GAP
    sheet = Image.new("RGB", (left + len(PROMPTS) * (side + GAP) - GAP, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    for row, ratio in enumerate(ratios):
        top = 3 * TEXT + row * (side + GAP)
        draw.text(
            (0, top + side // 2 - TEXT), f"{metrics['tokens'][ratio]} tokens\n({ratio}x)", "black", font
        )
        for column, prompt in enumerate(PROMPTS):
            corner = (left + column * (side + GAP), top)
            image = images[texts.index(prompt) * len(ratios) + row]
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), corner)
    for column, prompt in enumerate(PROMPTS):
        draw.text((left + column * (side + GAP), 0), textwrap.fill(prompt, 20), "black", font)
    return sheet


def frame(draw: ImageDraw.ImageDraw, corner: tuple[int, int], side: int, colour: str) -> None:
    """Draw a frame inside a square."""
    x, y = corner
    draw.rectangle((x, y, x + side - 1, y + side - 1), outline=colour, width=4)


if __name__ == "__main__":
    main()
