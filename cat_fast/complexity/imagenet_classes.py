"""Descriptions of ImageNet classes, whose flags of text and faces are supplied by hand, as in the paper."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cat_fast.complexity.description import Description
from cat_fast.errors import UserError

CLASS_FLAGS = Path(__file__).parent / "assets" / "imagenet_class_flags.jsonl"
"""The packaged flags; see PROVENANCE.md in the same folder."""


@dataclass(frozen=True)
class ImageNetClass:
    """A class of ImageNet-1k."""

    number: int
    """0 .. 999, in the usual order."""
    synset: str
    """WordNet ID, the name of its folder, such as n01443537."""
    name: str
    """As in torchvision."""
    has_text: bool
    """True if most photographs of the class show text or a number."""
    has_faces: bool
    """True if most photographs of the class show a human face."""

    @property
    def description(self) -> Description:
        """The description of the class, "this is an image of [name]", with its flags."""
        return Description.from_label(self.name, self.has_text, self.has_faces)


@cache
def imagenet_classes() -> tuple[ImageNetClass, ...]:
    """Return the 1,000 classes in the usual order."""
    rows = [json.loads(line) for line in CLASS_FLAGS.read_text(encoding="utf-8").splitlines()]
    return tuple(
        ImageNetClass(row["class"], row["synset"], row["name"], row["has_text"], row["has_faces"])
        for row in rows
    )


def imagenet_description(label: str | int) -> Description:
    """Return the description of an ImageNet class with its flags.

    Args:
        label: number, name as in torchvision, comma-separated names that begin with it, or WordNet ID.

    Raises:
        UserError: there is no such class.
    """
    if isinstance(label, int):
        if not 0 <= label < len(imagenet_classes()):
            raise UserError(f"ImageNet class {label}: expected 0 .. {len(imagenet_classes()) - 1}")
        return imagenet_classes()[label].description
    found = _find(label)
    if found is None:
        raise UserError(
            f"{label!r} is not a class of ImageNet-1k; expected a name such as 'goldfish', or an ID such as"
            " 'n01443537'"
        )
    return found.description


def describe_labels(labels: Sequence[str]) -> list[Description]:
    """Return the descriptions of class labels, in order, with flags if all labels are classes of ImageNet.

    Flags of other labels are unknown, also of a label that only shares its name with an ImageNet class.
    WordNet IDs are replaced by names; other labels are kept as they are.
    """
    classes = [_find(label) for label in labels]
    found = [known for known in classes if known is not None]
    if len(found) < len(classes):
        return [Description.from_label(label) for label in labels]
    return [
        known.description
        if label == known.synset
        else Description.from_label(label, known.has_text, known.has_faces)
        for label, known in zip(labels, found, strict=True)
    ]


def _find(label: str) -> ImageNetClass | None:
    label = label.strip()
    first = label.split(",", maxsplit=1)[0].strip()
    keys = (label, first, first.lower().replace("_", " "))
    return next((_by_key()[key] for key in keys if key in _by_key()), None)


@cache
def _by_key() -> dict[str, ImageNetClass]:
    """Return the classes by WordNet ID, and by name, also in lower case."""
    by_name = {known.name: known for known in imagenet_classes()}
    by_lower = {known.name.lower(): known for known in imagenet_classes()}
    return by_lower | by_name | {known.synset: known for known in imagenet_classes()}
