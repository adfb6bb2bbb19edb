"""Inputs of captions: caption files, archives, folders and images, from the paths that a user names."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from cat_fast.complexity.description import Description
from cat_fast.complexity.scoring_run.arguments import ACCEPTED, Kind, kind_by_ending
from cat_fast.complexity.scoring_run.image_samples import ImageShards
from cat_fast.complexity.scoring_run.outputs import PARTIAL
from cat_fast.complexity.scoring_run.samples import (
    Archive,
    Flags,
    GivenTexts,
    ImageFiles,
    ImageFolder,
    Input,
    JsonLines,
    ParquetRows,
    TextLines,
    has_captions,
)
from cat_fast.data.images.caption_file import read_caption
from cat_fast.data.images.io import IMAGE_SUFFIXES, walk_files
from cat_fast.data.streams.formats.base import ARCHIVE_SUFFIXES, ShardSet
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.image_files import FolderShards
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.text_files import decode_text, escape_text
from cat_fast.errors import UserError

_READERS: dict[str, Any] = {"json lines": JsonLines, "text": TextLines, "parquet": ParquetRows}
_NO_CAPTION = (
    "no captions, which this scorer reads: expected a text file next to each image (a.txt of a.jpg), a file"
    " with a column or field caption (.jsonl, .parquet), or an archive (.tar); or score the images with"
    " --captioner or --scorer image_student"
)
_SNIFFED_BYTES = 4096
SINGLE_IMAGES = "images"
"""Name of the input that single images form."""


class Inputs:
    """Inputs in order, and those that turned out to be unusable.

    Args:
        problems: one line per unusable input, with its name.
    """

    def __init__(self, inputs: Sequence[Input], problems: Iterable[str] = ()) -> None:
        self.inputs, self.problems = list(inputs), list(problems)

    def __iter__(self) -> Iterator[Input]:
        return iter(self.inputs)

    def total(self) -> int | None:
        """Return the number of samples; extrapolated while archives are not opened, None before the first."""
        counts = [
            found.count() if isinstance(found, Archive | ImageShards) else self._counts[found.name]
            for found in self
        ]
        known = [count for count in counts if count is not None]
        return round(sum(known) + fmean(known) * (len(counts) - len(known))) if known else None

    @cached_property
    def _counts(self) -> dict[str, int | None]:
        return {found.name: found.count() for found in self if not isinstance(found, Archive | ImageShards)}


def open_inputs(
    files: Sequence[str] = (),
    captions: Sequence[str] = (),
    labels: Sequence[str] = (),
    flags: Flags = Flags(),  # noqa: B008 # immutable
    is_output: Callable[[Path], bool] = lambda path: False,
) -> Inputs:
    """Open everything that is to be scored; files are read later.

    Args:
        files: caption files (.jsonl, .txt, .parquet), images with a .txt file next to each, archives or
            patterns of them (`list_shards`), and folders of these.
        captions, labels: texts to score; a label is scored as "this is an image of LABEL".
        flags: flags of samples without their own.
        is_output: returns whether a file is the run's own output, which is left out of folders.

    Raises:
        UserError: there is nothing to score; a file is missing, named twice, or of an unknown kind; or no
            caption or label is valid.
    """
    inputs: list[Input] = []
    problems: list[str] = []
    if captions:
        inputs.append(GivenTexts("caption", captions, flags))
    if labels:
        inputs.append(GivenTexts("label", labels, flags, Description.from_label))
    if inputs and not files:
        _require_any_valid(inputs)
    found = _Found()
    for file in files:
        _find(file, found, problems, is_output)
    inputs += _open(found, flags, [given.name for given in inputs])
    if not inputs:
        raise UserError("; ".join(problems) or "nothing to score: pass captions, or files of them")
    return Inputs(inputs, problems)


@dataclass
class _Found:
    """Files to read, in order."""

    paths: list[tuple[str, Kind | FolderShards]] = field(default_factory=list)
    """Tables and archives with their kind, folders with their images."""
    images: list[Path] = field(default_factory=list)
    """Single images, which form one input."""


def _find(file: str, found: _Found, problems: list[str], is_output: Callable[[Path], bool]) -> None:
    """Add what a path names to `found`, or the reason why it is unusable to `problems`."""
    path = Path(file)
    if is_output(path):
        raise UserError(f"{shown(path)}: cannot be both input and output; choose another --out")
    if is_pattern(file):
        found.paths += [(archive, "archive") for archive in list_archives(file)]
        return
    if path.is_dir():
        _find_in_folder(path, found, problems, is_output)
        return
    kind = kind_by_ending(file) if path.is_file() else None
    kind = kind or _sniff(path)
    if kind == "image":
        if _has_caption(path):
            found.images.append(path)
        else:
            problems.append(f"{shown(path)}: {_NO_CAPTION}")
    elif not path.stat().st_size:
        problems.append(f"{shown(path)}: the file is empty")
    else:
        found.paths.append((file, kind))


def _find_in_folder(
    folder: Path, found: _Found, problems: list[str], is_output: Callable[[Path], bool]
) -> None:
    """Add the archives of a folder, else its described images, else its caption files."""
    kinds = {path: kind_by_ending(path.name) for path in list_files(folder) if not is_output(path)}
    archives = [path for path, kind in kinds.items() if kind == "archive"]
    pictured = any(path.suffix.lower() in IMAGE_SUFFIXES for path in kinds)
    images = FolderShards(folder, described=True) if pictured and not archives else None
    # Next to images, text files are their captions.
    tables = ("json lines", "parquet") if images else ("json lines", "parquet", "text")
    accepted = [(path, kind) for path, kind in kinds.items() if kind is not None and kind in tables]
    if archives:
        found.paths += [(str(path), "archive") for path in archives]
    elif images and has_captions(images):
        found.paths.append((str(folder), images))
    elif accepted:
        for path, kind in accepted:
            if path.stat().st_size:
                found.paths.append((str(path), kind))
            else:
                problems.append(f"{shown(path)}: the file is empty")
    else:
        problems.append(f"{shown(folder)}: {_NO_CAPTION if images else f'expected {ACCEPTED}'}")


def _open(found: _Found, flags: Flags, others: Sequence[str]) -> list[Input]:
    """Return the readers of all files.

    Args:
        others: names of the other inputs. If there are any, keys in archives and folders start with their
            name.
    """
    paths = [Path(path) for path, _ in found.paths]
    require_distinct([*paths, *found.images])
    single = not others and len(paths) + bool(found.images) == 1
    taken = {*others, *([SINGLE_IMAGES] if found.images else [])}
    archives = [path for path, kind in found.paths if kind == "archive"]
    shards = open_archives(archives) if archives else None
    positions = {path: position for position, path in enumerate(archives)}
    inputs: list[Input] = []
    for name, (path, kind) in zip(distinct_names(paths, taken), found.paths, strict=True):
        if isinstance(kind, FolderShards):
            inputs.append(ImageFolder(name, kind, flags, "" if single else f"{name}/"))
        elif shards and kind == "archive":
            prefix = "" if single else f"{without_ending(name)}/"
            inputs.append(Archive(name, shards, positions[path], flags, prefix))
        else:
            inputs.append(_READERS[kind](name, Path(path), flags))
    if found.images:
        inputs.append(ImageFiles(SINGLE_IMAGES, found.images, distinct_names(found.images), flags))
    return inputs


def distinct_names(paths: Sequence[Path], taken: Collection[str] = ()) -> list[str]:
    """Return the names of files, preceded by as many folders as needed to distinguish them.

    Names depend on the real paths, not on how they are spelled, and are the same for one set of files.

    Args:
        taken: names of other inputs, none of which contains a folder.
    """
    parts = [tuple(reversed(Path(os.path.abspath(path)).parts)) for path in paths]
    lengths = [1] * len(paths)
    while True:
        names = [part[:length] for part, length in zip(parts, lengths, strict=True)]
        repeated = {name for name, count in Counter(names).items() if count > 1 or "/".join(name) in taken}
        longer = [
            min(length + (name in repeated), len(part))
            for name, length, part in zip(names, lengths, parts, strict=True)
        ]
        if longer == lengths:
            return [escape_text("/".join(reversed(name))) for name in names]
        lengths = longer


def require_distinct(paths: Sequence[Path]) -> None:
    real = Counter(os.path.realpath(path) for path in paths)
    for path in paths:
        if real[os.path.realpath(path)] > 1:
            raise UserError(f"{path}: named twice; name each file once")


def _require_any_valid(inputs: Sequence[Input]) -> None:
    """Raise the first error if all texts of the command line are invalid."""
    errors = [sample.error for found in inputs for sample in found.samples()]
    if all(errors):
        raise UserError(errors[0])


def is_pattern(file: str) -> bool:
    """Return whether a path names archives by their URL, with wildcards, or with braces."""
    return "://" in file or (any(c in file for c in "*{") and not os.path.lexists(file))


def open_archives(names: list[str]) -> ShardSet:
    from cat_fast.data.streams.formats.remote import Remote
    from cat_fast.data.streams.formats.tar import TarShards  # imports webdataset, and so torch

    problems = ProblemLog()
    return TarShards(names, Remote(StreamConfig(), problems), problems)


def list_archives(pattern: str) -> list[str]:
    from cat_fast.data.streams.formats.remote import Remote
    from cat_fast.data.streams.formats.tar import list_shards

    return list_shards(pattern, Remote(StreamConfig(), ProblemLog()))


def _sniff(path: Path) -> Kind:
    """Return the kind of a file without a known ending by its first bytes.

    Raises:
        UserError: it is missing, not a file, or of another kind.
    """
    name = shown(path)
    if not path.exists():
        raise UserError(f"{name}: cannot be read (No such file or directory); check the path")
    if not path.is_file():
        raise UserError(f"{name}: is a device or pipe; expected a file")
    try:
        with path.open("rb") as file:
            start = file.read(_SNIFFED_BYTES)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error}); check the path") from error
    if start.startswith(b"PAR1"):
        return "parquet"
    if start[257:262] == b"ustar":
        return "archive"
    try:
        # The last line may be cut within a character.
        text = decode_text(start.rpartition(b"\n")[0] or start)
    except ValueError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{name}: expected captions: {ACCEPTED}; rename or convert it")
    return "json lines" if text.lstrip().startswith("{") else "text"


def _has_caption(photo: Path) -> bool:
    try:
        return bool(read_caption(photo))
    except UserError:  # reported as the sample's error
        return True


def list_files(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders, sorted; not those of unfinished scores."""
    found = walk_files(folder)
    return sorted(
        path
        for path in found
        if not any(part.endswith(PARTIAL) for part in path.relative_to(folder).parent.parts)
    )


def without_ending(name: str) -> str:
    ending = next((end for end in ARCHIVE_SUFFIXES if name.endswith(end)), "")
    return name.removesuffix(ending)


def shown(path: Path) -> str:
    return escape_text(str(path))
