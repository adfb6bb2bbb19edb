"""Emoji of the corpus that the generator was trained on, and the classifier of some of them."""

from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.nano.emoji_classifier import CLASSES, Trained, train_classifier
from benchmarks.nano.samples import ENDING, Prompts, load_renderings
from cat_fast.data.images.index import ImageRecord, read_index
from cat_fast.errors import UserError

NOT_TRAINED = ("*1f3f[b-f]*", "emoji/1f1??-1f1??")
"""Keys that the generator's data leaves out: skin tones and flags."""


def of_source(index: Path, source: str) -> list[ImageRecord]:
    """Return the records of one source of the corpus.

    Raises:
        UserError: there are none.
    """
    found = [one for one in read_index(index) if one.key.startswith(f"{source}/")]
    if not found:
        raise UserError(f"{index} has no images of {source}; build them with cat-fast data corpus")
    return found


def training_emoji(corpus: Path) -> list[ImageRecord]:
    """Return the records of the generator's training images."""
    every = of_source(corpus / "train.jsonl", "emoji")
    return [one for one in every if not any(fnmatch(one.key, pattern) for pattern in NOT_TRAINED)]


class EmojiData:
    """Training images with captions and the classifier of some of them; each made when it is used."""

    def __init__(self, records: list[ImageRecord]) -> None:
        self.records = records
        self.captions = [one.caption.removesuffix(ENDING) for one in records]
        self.prompts = Prompts.load()

    @cached_property
    def renderings(self) -> Tensor:
        """All images, (N, 3, H, W) in [-1, 1]."""
        return load_renderings(self.records)

    @cached_property
    def classifier(self) -> Trained:
        """Classifier of `CLASSES` of the images, the fixed prompts among them."""
        chosen = self.evenly_spaced(CLASSES)
        return train_classifier(self.renderings[chosen], [self.captions[i] for i in chosen])

    def evenly_spaced(self, count: int) -> list[int]:
        """Return the indices of `count` images: the fixed prompts, the other classes, and others."""
        chosen: list[int] = [self._index[prompt] for prompt in self.prompts.trained]
        for total in (min(count, CLASSES), count):
            taken = set(chosen)
            others = [i for i in range(len(self.captions)) if i not in taken]
            spaced = np.linspace(0, len(others) - 1, total - len(chosen)).round().astype(int)
            chosen += [others[i] for i in spaced]
        return chosen

    @cached_property
    def _index(self) -> dict[str, int]:
        return {caption: i for i, caption in enumerate(self.captions)}
