"""A static page on which people rank reconstructions by their similarity to the original.

The page contains all images and needs no server. It shuffles sets and methods per participant, names no
method, and saves the answers to a JSON file, which `tally` reads. The first of n methods gets n points, the
last one 1: 3, 2 and 1 for three methods, as in the dual-token tokenizer's paper (section 4.1).
"""

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader

from cat_fast.data.files import atomic_write
from cat_fast.data.images.io import find_images, load_image
from cat_fast.errors import UserError

MAX_SIDE = 512
"""Images are downscaled to this side, in pixels."""


@dataclass(frozen=True)
class RankedSet:
    """An original and its reconstructions by all methods."""

    key: str
    original: Path
    methods: Mapping[str, Path]


def find_sets(originals: Path, methods: Mapping[str, Path], limit: int | None = None) -> list[RankedSet]:
    """Return the sets of images that the originals and all methods have, by file name without extension.

    Raises:
        UserError: fewer than two methods, or no image in all folders.
    """
    if len(methods) < 2:
        raise UserError(f"ranking: expected at least two methods, got {len(methods)}")
    by_key = {name: _by_key(folder) for name, folder in {"": originals, **methods}.items()}
    keys = sorted(set.intersection(*(set(files) for files in by_key.values())))
    if not keys:
        raise UserError(
            "ranking: no image is in all folders; expected files of the same names, whatever their extensions"
        )
    return [
        RankedSet(key, by_key[""][key], {name: by_key[name][key] for name in methods}) for key in keys[:limit]
    ]


def study_id(sets: Sequence[RankedSet]) -> str:
    """Return 16 hex digits that identify the methods and images of a study."""
    content = [(one.key, sorted(one.methods)) for one in sets]
    return hashlib.sha256(json.dumps(content).encode(errors="surrogatepass")).hexdigest()[:16]


def write_page(path: Path, sets: Sequence[RankedSet], question: str) -> None:
    """Write the page.

    Args:
        question: shown above each set.

    Raises:
        UserError: an image cannot be read, or the file cannot be written.
    """
    study = {
        "study": study_id(sets),
        "question": question,
        "sets": [
            {
                "key": one.key,
                "original": _uri(one.original),
                "methods": [{"name": name, "image": _uri(file)} for name, file in one.methods.items()],
            }
            for one in sets
        ],
    }
    environment = Environment(loader=PackageLoader("cat_fast.evaluation.ranking"), autoescape=True)
    html = environment.get_template("ranking.html.j2").render(study=study)
    with atomic_write(path) as part:
        part.write_text(html, encoding="utf-8")


def _by_key(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected images")
    found: dict[str, Path] = {}
    for path in find_images([folder]):
        key = str(path.relative_to(folder).with_suffix(""))
        if key in found:
            raise UserError(f"{folder}: {found[key].name} and {path.name} have one name; keep one of them")
        found[key] = path
    return found


def _uri(path: Path) -> str:
    image = load_image(path)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
