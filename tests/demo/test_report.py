"""The report: one self-contained file, with each held-out image once and the values of metrics.json."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cat_fast.data.images.io import tensor_to_image
from cat_fast.demo.report import image_uri, write_section
from tests.demo.conftest import CAPTION, LABELS, SIZE

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Parsed page: start tags with attributes, table rows, figure captions and text, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[str]] = []
        self.captions: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "figcaption":
            self.captions.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if "figcaption" in self.open:
            self.captions[-1] += data

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def images(self) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


@pytest.fixture(scope="session")
def html(miniature) -> str:
    return miniature.report.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def page(html) -> Page:
    return Page(html)


def decode_uri(uri: str) -> Image.Image:
    kind, data = re.fullmatch(r"data:image/(jpeg|png);base64,(.+)", uri).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    image.load()
    assert image.format.lower() == kind
    return image.convert("RGB")


def distance(image: Image.Image, uri: str) -> float:
    """Return the mean absolute difference of the 8-bit values."""
    shown = decode_uri(uri)
    assert shown.size == image.size
    return float(np.abs(np.asarray(shown, dtype=float) - np.asarray(image, dtype=float)).mean())


def test_every_tag_is_closed(page):
    assert page.open == []


def test_page_loads_no_external_resources(html, page):
    assert not re.search(r"https?://|file:|//[a-z]+\.|url\(|@import", html.replace("http://www.w3.org/", ""))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "video"}
    for _, attributes in page.tags:
        assert not {"srcset", "background", "action"} & attributes.keys()
        assert attributes.get("href", "#").startswith("#")


def test_every_image_is_embedded_and_valid(page, miniature):
    images = page.images()
    plots = 2
    photographs = len(miniature.metrics["photographs"])
    assert len(images) == 4 * len(miniature.results) + len(miniature.samples) + photographs + plots
    for attributes in images:
        decode_uri(attributes["src"])
        assert attributes["alt"]


def test_each_held_out_image_has_a_row_with_its_three_reconstructions(page, miniature):
    shown = page.images()
    for number, result in enumerate(miniature.results):
        row = shown[4 * number : 4 * number + 4]
        assert [image["alt"] for image in row] == ["original", "8x", "16x", "32x"]
        images = [result.original, *(result.at[ratio].image for ratio in (8, 16, 32))]
        for index, expected in enumerate(images):
            # JPEG blurs an untrained tokenizer's noise: the right image is the nearest one.
            distances = [distance(tensor_to_image(expected), image["src"]) for image in row]
            assert min(distances) == distances[index]
            assert distances[index] < 15


def test_only_the_chosen_reconstruction_of_a_row_is_marked(page, miniature):
    shown = page.images()
    cells = [caption for caption in page.captions if "dB" in caption]
    for number, result in enumerate(miniature.results):
        framed = [
            i["alt"] for i in shown[4 * number : 4 * number + 4] if "border-color" in i.get("style", "")
        ]
        assert framed == [f"{result.record.ratio}x"]
        marked = [c.split(",")[0].strip() for c in cells[3 * number : 3 * number + 3] if "chosen" in c]
        assert marked == framed


def test_captions_are_escaped(html, page, miniature):
    assert f"“{CAPTION}”" in page.words()
    assert "<b>&#34;no" not in html
    assert not [tag for tag, _ in page.tags if tag == "b"][4:], "only the four cards have bold text"


def test_figure_captions_agree_with_the_metrics(page, miniature):
    cells = iter([caption for caption in page.captions if "dB" in caption])
    for image in miniature.metrics["images"]:
        for ratio, at in image["at"].items():
            expected = (
                f"{ratio}x, {at['tokens']} tokens, {at['psnr']:.1f} dB, perceptual {at['perceptual']:.2f}"
            )
            assert " ".join(next(cells).split()).removesuffix(" chosen") == expected
    assert next(cells, None) is None


def test_tables_and_cards_agree_with_the_metrics(page, miniature):
    metrics = miniature.metrics
    held = metrics["held_out"]
    assert [*map(str, held["per_ratio"])] == ["8", "16", "32"]
    for ratio, mean in held["per_ratio"].items():
        figures = [f"{mean['tokens']:.0f}", f"{mean['psnr']:.2f}", f"{mean['perceptual']:.3f}"]
        assert [f"{ratio}x for all", *figures] in page.rows
    chosen = held["chosen"]
    figures = [f"{chosen['tokens']:.0f}", f"{chosen['psnr']:.2f}", f"{chosen['perceptual']:.3f}"]
    assert ["chosen per image", *figures] in page.rows
    for name, budget in (("captions", "captions"), ("packaged photographs", "photographs")):
        budget = metrics["complexity"][budget]
        mix = [f"{100 * budget['mix'].get(f, 0):.0f} %" for f in ("8", "16", "32")]
        tokens = [f"{budget['mean_tokens']:.0f}", f"{100 * budget['relative_to_fixed_16x']:.0f} %"]
        assert [name, str(budget["count"]), *mix, *tokens] in page.rows
    assert metrics["seconds"]
    for phase, seconds in metrics["seconds"].items():
        assert [phase.replace("_", " "), str(seconds)] in page.rows
    generator = metrics["generator_training"]
    for words in (
        f"{chosen['psnr']:.1f} dB",
        f" {chosen['psnr'] - held['mean_colour_psnr']:+.1f} dB over each image's mean colour",
        f"{100 * chosen['tokens_vs_fixed_16x']:.0f} %",
        f"trained for {metrics['tokenizer_training']['steps']} steps",
        f"for {generator['steps']} on",
        f"fell from {generator['first_loss']:.2f} to {generator['final_loss']:.2f}",
        f"12 images, packed into 250 tokens; padded to the longest sequence, they would take {12 * 16}",
    ):
        assert words in page.words(), words


def test_each_photograph_has_its_flags_score_confidence_and_ratio(page, miniature):
    for photo in miniature.metrics["photographs"]:
        (row,) = [row for row in page.rows if len(row) == 7 and row[1] == photo["caption"]]
        text = "yes" if photo["listed"]["has_text"] else "yes*"
        faces = "yes" if photo["has_faces"] else "no"
        confidence = "0.87" if photo["confidence"] else ""
        assert row[2:6] == [text, faces, str(photo["score"]), confidence]
        assert row[6].strip() == f"{photo['ratio']}x"


def test_each_sample_is_shown_under_its_ratio_and_token_count(page, miniature):
    shown = [image for image in page.images() if " at " in image["alt"]]
    assert [image["alt"] for image in shown] == [f"{label} at {f}x" for label in LABELS for f in (8, 16, 32)]
    by_name = {f"{s['label']} at {s['ratio']}x": s["image"] for s in miniature.samples}
    assert all(distance(by_name[image["alt"]], image["src"]) < 2 for image in shown)
    for f in (8, 16, 32):
        assert f"{f}x, {(SIZE // f // 2) ** 2} tokens" in page.captions


def test_plots_are_not_empty(page):
    plots = [decode_uri(i["src"]) for i in page.images() if i["src"].startswith("data:image/png")]
    assert len(plots) == 2
    for plot in plots:
        assert plot.width > 1000
        assert len(plot.getcolors(maxcolors=1 << 24)) > 50


def test_embedded_image_is_close_to_the_original():
    gradient = Image.linear_gradient("L").convert("RGB")
    assert distance(gradient, image_uri(gradient)) < 2


def test_sections_of_one_report_are_kept_whichever_is_written_last(tmp_path):
    path = tmp_path / "report.html"
    parts = {
        "metrics": {
            "resolution": 64, "steps": 2, "guidance": {"8": 2.5}, "sample_resolution": 64,
            "held_out": {"chosen": {"psnr": 23.45}, "per_ratio": {"8": {"psnr": 26.12}}},
        },
        "ratios": [8], "colours": {8: "#000"}, "rows": [], "samples": {("<a>", 8): "data:,"},
        "prompts": [{"text": "<a>", "score": 1, "confidence": 0.87, "ratio": 8}], "tokens": {8: 16},
        "tables": [{"title": "Reconstruction", "header": ["ratio"], "rows": [["8x"]]}],
    }  # fmt: skip
    write_section(path, "shipped", **parts)
    alone = path.read_text(encoding="utf-8")
    assert "&lt;a&gt;" in alone
    assert "<td>8x</td>" in alone
    assert "guidance scales 2.5 at 8x;" in " ".join(Page(alone).words().split())
    assert "score 1, confidence 87 % → 8x" in Page(alone).words()
    (tmp_path / "sections" / "training.html").write_text("<p>trained here</p>")
    write_section(path, "shipped", **parts)
    both = path.read_text(encoding="utf-8")
    assert both.index("the shipped models") < both.index("trained here")
    Page(both)
