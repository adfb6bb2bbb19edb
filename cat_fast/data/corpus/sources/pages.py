"""Pages of black text, rendered from the LaTeX documentation."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from cat_fast.data.corpus.sources.base import CorpusImage, Problem, Source

DPI = 200
"""At this resolution 10 pt Computer Modern has an x-height of 12 px."""
_PAGES_PER_DOCUMENT = 6
_MARGIN = 0.12
"""Share of the page's sides that is cropped: almost empty."""
_SECONDS = 120


def _images(folder: Path, problem: Problem) -> Iterator[CorpusImage]:
    if shutil.which("pdftoppm") is None:
        problem("pages", "pdftoppm is not installed; install poppler-utils")
        return
    for path in sorted(folder.rglob("*.pdf")):
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
                    image = _without_margin(opened.convert("RGB"))
                number = page.stem.removeprefix("page-")
                caption = "a page of black text on white paper"
                yield CorpusImage(
                    f"{name}-{number}", image, caption, name, "page", has_text=True, has_faces=False
                )


def _without_margin(page: Image.Image) -> Image.Image:
    x, y = round(page.width * _MARGIN), round(page.height * _MARGIN)
    return page.crop((x, y, page.width - x, page.height - y))


PAGES = Source(
    name="pages",
    packages=("texlive-latex-base-doc",),
    patterns=("usr/share/doc/texlive-doc/latex/*.pdf", "usr/share/doc/texlive-doc/bibtex/*.pdf"),
    images=_images,
    licence="LaTeX Project Public License and others, by file (copyright file of the package)",
    shown=False,
    lossless=True,
    disk=700_000_000,
)
