"""Photographs: landscapes of Endless Sky, nebulae of Stellarium, desktop wallpapers."""

import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from cat_fast.data.corpus.sources.base import (
    CorpusImage,
    Problem,
    Source,
    is_plain,
    is_shipped,
    reduced,
    words_of,
)
from cat_fast.data.images.io import load_image
from cat_fast.errors import UserError

_LANDSCAPES = {
    "badlands": "badlands with eroded rock",
    "beach": "a beach by the sea",
    "canyon": "a canyon of layered rock",
    "city": "a city with many buildings",
    "desert": "a desert",
    "dune": "sand dunes",
    "fields": "green fields",
    "fog": "a landscape in fog",
    "forest": "a forest",
    "hills": "hills",
    "lava": "glowing lava",
    "mountain": "a mountain",
    "sea": "the sea",
    "sky": "clouds in the sky",
    "snow": "a landscape covered in snow",
    "space": "a planet seen from space",
    "valley": "a valley between mountains",
    "water": "a lake or river",
}
"""Captions of the landscapes whose file name is a subject and a number."""
_SCREENS = ("screenshot", "preview", "1080x1920", "720x1440", "360x720", "vertical", "logo")
"""Parts of file names of previews, variants for telephones, and logos."""
_LOGOS = ("mate-stripes", "green-traditional", "greentraditional", "symbolic-")
"""Starts of the names of wallpapers that show a logo on one colour."""
_SIZE = re.compile(r"_\d+x\d+$")
_VARIANT = re.compile(r"-(?:l|d|light|dark)$")


def _landscapes(folder: Path, problem: Problem) -> Iterator[CorpusImage]:
    for path in sorted(folder.rglob("land/*.jpg")):
        if is_shipped(path, folder):
            continue
        subject = next((name for name in _LANDSCAPES if path.stem.startswith(name)), None)
        caption = f"{_LANDSCAPES[subject]}, photograph" if subject else "a landscape, photograph"
        yield from _photograph(path, path.stem, caption, path.stem.split("-")[0], "landscape", problem)


def _nebulae(folder: Path, problem: Problem) -> Iterator[CorpusImage]:
    for path in sorted([*folder.rglob("nebulae/default/*.png"), *folder.rglob("nebulae/default/*.jpg")]):
        if is_shipped(path, folder):
            continue
        caption = "a nebula or galaxy among stars, photograph"
        yield from _photograph(path, path.stem, caption, path.stem.split("-")[0], "nebula", problem)


def _wallpapers(folder: Path, problem: Problem) -> Iterator[CorpusImage]:
    largest: dict[str, tuple[int, Path]] = {}
    for path in sorted(p for ending in ("jpg", "png", "webp") for p in folder.rglob(f"*.{ending}")):
        inner = path.relative_to(folder).parts
        if path.is_symlink() or any(part in path.stem.lower() for part in _SCREENS):
            continue
        # Plasma keeps one image in several sizes in WALLPAPER/contents/images.
        name = inner[inner.index("contents") - 1] if "contents" in inner else _SIZE.sub("", path.stem)
        if name.lower().startswith(_LOGOS) or is_shipped(path, folder):
            continue
        try:
            with Image.open(path) as opened:
                pixels = opened.width * opened.height
        except (OSError, ValueError) as error:
            problem(path.name, str(error))
            continue
        if min(opened.size) >= 480:
            largest[name] = max(largest.get(name, (0, path)), (pixels, path))
    for name, (_, path) in sorted(largest.items()):
        words = words_of("".join(f" {c}" if c.isupper() else c for c in name).split(" by ")[0])
        caption = f"{' '.join(words) or 'abstract shapes'}, wallpaper"
        group = _VARIANT.sub("", name.lower())  # a light and a dark variant
        yield from _photograph(path, name, caption, group, "wallpaper", problem)


def _photograph(
    path: Path, name: str, caption: str, group: str, category: str, problem: Problem
) -> Iterator[CorpusImage]:
    try:
        image = load_image(path)
    except UserError as error:
        problem(path.name, str(error))
        return
    if min(image.size) >= 128 and not is_plain(image):
        yield CorpusImage(name, reduced(image), caption, group, category=category)


SCENES = Source(
    name="landscapes",
    packages=("endless-sky-data",),
    patterns=("usr/share/games/endless-sky/images/land/*.jpg",),
    images=_landscapes,
    licence="public domain, CC-BY and CC-BY-SA, by file (copyright file of the package)",
    shown=False,
    lossless=False,
    disk=80_000_000,
    version=2,
    repeats=6,
)
NEBULAE = Source(
    name="nebulae",
    packages=("stellarium-data",),
    patterns=("usr/share/stellarium/nebulae/default/*",),
    images=_nebulae,
    licence="CC-BY-3.0, public domain and GPL-2.0-or-later, by file (copyright file of the package)",
    shown=False,
    lossless=False,
    disk=400_000_000,
)
WALLPAPERS = Source(
    name="wallpapers",
    packages=(
        "plasma-workspace-wallpapers",
        "gnome-backgrounds",
        "mate-backgrounds",
        "lxqt-themes",
        "lomiri-wallpapers-16.04",
        "lomiri-wallpapers-20.04",
        "ukui-wallpapers",
    ),
    patterns=(
        "usr/share/wallpapers/*",
        "usr/share/backgrounds/*",
        "usr/share/lxqt/wallpapers/*",
    ),
    images=_wallpapers,
    licence="CC-BY-SA, CC0, GPL and LGPL, by package (copyright files of the packages)",
    shown=False,
    lossless=False,
    disk=400_000_000,
    version=2,
    repeats=6,
)
