"""Crops of pages of black text, rendered from the LaTeX documentation."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from cat_fast.data.corpus.sources.base import CorpusImage, Problem, Source, is_shipped

DPI = 200
"""At this resolution 10 pt Computer Modern has an x-height of 12 px."""
SIDE = 256
"""Side of a crop in pixels."""
_PAGES_PER_DOCUMENT = 6
_CROPS_PER_PAGE = 3
_MARGIN = 0.12
"""Share of the page's sides that is cropped: almost empty."""
_INK = (0.04, 0.3)
"""Share of dark pixels in a crop that holds text, not a title, a formula on its own or a figure."""
_SECONDS = 120
_CAPTION = "black text on a page of white paper"


def _images(folder: Path, problem: Problem) -> Iterator[CorpusImage]:
    if shutil.which("pdftoppm") is None:
        problem("pages", "pdftoppm is not installed; install poppler-utils")
        return
    for path in sorted(folder.rglob("*.pdf")):
        if is_shipped(path, folder):
            continue
        name = "-".join(path.relative_to(folder).with_suffix("").parts[-2:])
        with tempfile.TemporaryDirectory() as pages:
            # The second page on: the first is often a title.
            command = ["pdftoppm", "-r", str(DPI), "-gray", "-png", "-f", "2"]
            command += ["-l", str(1 + _PAGES_PER_DOCUMENT), str(path), f"{pages}/page"]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
            except subprocess.SubprocessError as error:
                problem(path.name, str(error))
                continue
            for page in sorted(Path(pages).glob("*.png")):
                with Image.open(page) as opened:
                    crops = _crops(opened.convert("L"))
                number = page.stem.removeprefix("page-")
                for i, crop in enumerate(crops):
                    yield CorpusImage(
                        f"{name}-{number}-{i}", crop, _CAPTION, name, "page", has_text=True, has_faces=False
                    )


def _crops(page: Image.Image) -> list[Image.Image]:
    """Return a few square crops of a page that hold text, spread over the page, at full resolution."""
    x, y = round(page.width * _MARGIN), round(page.height * _MARGIN)
    corners = [
        (left, top)
        for top in range(y, page.height - y - SIDE + 1, SIDE)
        for left in range(x, page.width - x - SIDE + 1, SIDE)
    ]
    crops = [page.crop((left, top, left + SIDE, top + SIDE)) for left, top in corners]
    least, most = _INK
    full = [crop for crop in crops if least < sum(crop.histogram()[:128]) / SIDE**2 < most]
    count = min(_CROPS_PER_PAGE, len(full))
    return [full[i * len(full) // count].convert("RGB") for i in range(count)]


PAGES = Source(
    name="pages",
    packages=("texlive-latex-base-doc",),
    patterns=("usr/share/doc/texlive-doc/latex/*.pdf", "usr/share/doc/texlive-doc/bibtex/*.pdf"),
    images=_images,
    licence="LaTeX Project Public License and others, by file (copyright file of the package)",
    shown=False,
    lossless=True,
    disk=300_000_000,
    version=2,
)
