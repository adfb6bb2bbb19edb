"""The sources of the corpus; each writes images with captions from unpacked packages."""

from cat_fast.data.corpus.sources.base import CorpusImage, Source
from cat_fast.data.corpus.sources.clip_art import CLIP_ART
from cat_fast.data.corpus.sources.emoji import EMOJI
from cat_fast.data.corpus.sources.pages import PAGES
from cat_fast.data.corpus.sources.scenes import NEBULAE, SCENES, WALLPAPERS
from cat_fast.data.corpus.sources.shipped import PHOTOGRAPHS
from cat_fast.data.corpus.sources.stamps import STAMPS

SOURCES = {
    source.name: source
    for source in (EMOJI, STAMPS, CLIP_ART, SCENES, NEBULAE, WALLPAPERS, PAGES, PHOTOGRAPHS)
}
"""Sources by name."""

__all__ = ["SOURCES", "CorpusImage", "Source"]
