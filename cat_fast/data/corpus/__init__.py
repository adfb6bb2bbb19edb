"""A text–image corpus from Debian packages, for training small models.

`build_corpus` fetches pinned packages (`packages`), unpacks them without root (`deb`), and lets each source
(`sources`) write images with captions. Images are split by file into a training and a held-out index.
"""

from cat_fast.data.corpus.build import CorpusReport, build_corpus
from cat_fast.data.corpus.sources import SOURCES, Source

__all__ = ["SOURCES", "CorpusReport", "Source", "build_corpus"]
