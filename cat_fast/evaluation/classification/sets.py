"""Labelled image sets: folders, archives and Hugging Face datasets, with their classes."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from cat_fast.data.image_stamps import Stamp, image_stamps
from cat_fast.data.images.io import decode_image
from cat_fast.data.streams.formats.base import Entry, ShardSet, UnreadableShard
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.errors import UserError, one_line
from cat_fast.evaluation.tokenizers.columns import Scored
from cat_fast.inference.encoding.shard_plan import open_images

_TEST_NAMES = ("test", "val", "validation")
HUB = "hf:"


@dataclass(frozen=True)
class Labelled:
    """An image of a set; `image` is the reason if it cannot be read."""

    scored: Scored
    category: str
    image: Image.Image | str


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """One split of a labelled set."""

    source: str
    shards: ShardSet

    def read(self) -> Iterator[Labelled]:
        """Yield all images in their order."""
        for entry, _ in self._entries():
            scored = Scored(entry.key, entry.labels.score, entry.labels.expected)
            try:
                image: Image.Image | str = entry.damage or decode_image(entry.read())
            except (OSError, UserError) as error:
                image = str(error)
            yield Labelled(scored, entry.labels.category, image)

    def count(self) -> int:
        """Return the number of images, which takes a pass over their labels."""
        return sum(1 for _ in self._entries())

    @cached_property
    def fingerprint(self) -> str:
        """Hash that changes with the files and labels of the images; takes such a pass, too."""
        digest = hashlib.blake2b(self.shards.fingerprint.encode(), digest_size=8)
        for entry, stamp in self._entries():
            row = entry.key, entry.labels, stamp
            digest.update(repr(row).encode(errors="surrogatepass"))
        return digest.hexdigest()

    def classes(self) -> list[str]:
        """Return the class names, sorted.

        Raises:
            UserError: an image has no class, or there is one class only.
        """
        found = {entry.labels.category for entry, _ in self._entries()}
        if "" in found:
            raise UserError(
                f"{self.source}: an image has no class; expected a subfolder per class, or labels in archives"
            )
        if len(found) < 2:
            raise UserError(f"{self.source}: expected at least two classes, got {sorted(found)}")
        return sorted(found, key=lambda name: (int(name) if name.isdecimal() else -1, name))

    def _entries(self) -> Iterator[tuple[Entry, Stamp]]:
        """Yield all entries, each with the stamp of its file or archive.

        Raises:
            UserError: a shard cannot be opened.
        """
        for index, name in enumerate(self.shards.names):
            try:
                stamp_of, shard = image_stamps(self.shards, index), self.shards.open(index)
            except UnreadableShard as error:
                raise UserError(
                    f"{self.source}: {name} cannot be opened ({one_line(error)}); restore or remove it"
                ) from error
            yield from ((entry, stamp_of(entry)) for entry in shard.entries(0))


def open_splits(data: str) -> tuple[LabelledSet, LabelledSet]:
    """Open the training and test split of a set.

    Args:
        data: a folder with `train` and `test` (or `val`), each with a subfolder per class or with archives;
            TRAIN::TEST for two sources of `cat-fast encode-shards`; or hf:NAME, a Hugging Face dataset.

    Raises:
        UserError: a split is missing or cannot be read.
    """
    if data.startswith(HUB):
        return _hub_split(data, ("train",)), _hub_split(data, _TEST_NAMES)
    if "::" in data:
        train, test = data.split("::", 1)
        return _split(train), _split(test)
    folder = Path(data)
    test_folder = next((folder / name for name in _TEST_NAMES if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or test_folder is None:
        raise UserError(
            f"{data}: expected the subfolders train and test (or val), or two sources TRAIN::TEST, or hf:NAME"
        )
    return _split(str(folder / "train")), _split(str(test_folder))


def _split(source: str) -> LabelledSet:
    return LabelledSet(source=source, shards=open_images(source))


def _hub_split(data: str, names: tuple[str, ...]) -> LabelledSet:
    from cat_fast.data.streams.formats.hugging_face import HubShards

    path, _, config = data.removeprefix(HUB).partition("@")
    errors = []
    for name in names:
        try:
            return LabelledSet(
                source=f"{data} {name}", shards=HubShards(path, config, name, StreamConfig(), ProblemLog())
            )
        except UserError as error:
            errors.append(str(error))
    raise UserError(errors[0])
