"""Inputs of images: folders, indices, archives and files, from the paths that a user names."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cat_fast.complexity.scoring_run.arguments import kind_by_ending
from cat_fast.complexity.scoring_run.image_samples import ImageShards
from cat_fast.complexity.scoring_run.inputs import (
    SINGLE_IMAGES,
    Inputs,
    distinct_names,
    is_pattern,
    list_archives,
    list_files,
    open_archives,
    require_distinct,
    shown,
    without_ending,
)
from cat_fast.complexity.scoring_run.samples import Flags, has_captions
from cat_fast.data.images.caption_file import read_caption
from cat_fast.data.images.io import IMAGE_SUFFIXES
from cat_fast.data.streams.formats.base import Entry, Labels, ShardSet, UnreadableShard, no_image
from cat_fast.data.streams.formats.image_files import (
    FILES_PER_SHARD,
    FolderShards,
    IndexShards,
    ListedShard,
    read_file,
)
from cat_fast.data.text_files import byte_lines, is_blank, parse_object
from cat_fast.errors import UserError

ACCEPTED = "images, a folder of images, an image index (.jsonl), or archives (.tar)"


def open_images(
    files: Sequence[str],
    flags: Flags = Flags(),  # noqa: B008 # immutable
    is_output: Callable[[Path], bool] = lambda path: False,
) -> Inputs:
    """Open the images that are to be scored; they are read later.

    Args:
        files: images, folders of images or archives, image indices (.jsonl with "path"), archives or patterns
            of them (`list_shards`). Captions and flags that they have are given to the scorer.
        flags: flags of images without their own.
        is_output: returns whether a file is the run's own output.

    Raises:
        UserError: there is nothing to score; or a file is missing, named twice, or of another kind.
    """
    sets: list[tuple[str, ShardSet | None]] = []  # None for an archive, opened later
    single: list[Path] = []
    for file in files:
        path = Path(file)
        if is_output(path):
            raise UserError(f"{shown(path)}: cannot be both input and output; choose another --out")
        if is_pattern(file):
            sets += [(archive, None) for archive in list_archives(file)]
        elif path.is_dir():
            sets += _in_folder(path, is_output)
        elif not path.exists():
            raise UserError(f"{shown(path)}: cannot be read (No such file or directory); check the path")
        else:
            match kind_by_ending(file):
                case "image":
                    single.append(path)
                case "archive":
                    sets.append((file, None))
                case "json lines":
                    sets.append((file, _index(path)))
                case _:
                    raise UserError(
                        f"{shown(path)}: contains no images; expected {ACCEPTED}. Captions alone are scored"
                        " without --captioner, by a scorer of captions"
                    )
    return Inputs(_open(sets, single, flags))


def lack_captions(files: Sequence[str], is_output: Callable[[Path], bool] = lambda path: False) -> bool:
    """Return whether all files are images without captions, by their first ones; missing files are not.

    Args:
        is_output: returns whether a file is the run's own output, which is not one of captions.
    """
    return bool(files) and all(_lacks_captions(file, is_output) for file in files)


class _Files:
    """`ShardSet` of single images, with the text next to each."""

    fingerprint = ""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self.keys, self.names = paths, distinct_names(paths), [SINGLE_IMAGES]
        self.extent = len(paths)

    def open(self, index: int) -> ListedShard:
        files = enumerate(zip(self.paths, self.keys, strict=True))
        return ListedShard(SINGLE_IMAGES, [self._entry(*at) for at in files])

    def labels(self, index: int) -> list[Labels] | None:
        return None

    def _entry(self, number: int, file: tuple[Path, str]) -> Entry:
        path, key = file
        try:
            labels = Labels(caption=read_caption(path))
        except UserError as error:
            return Entry(number, key, Labels(), no_image, str(error))
        return Entry(number, key, labels, partial(read_file, path), path=str(path))


def _open(sets: list[tuple[str, ShardSet | None]], single: list[Path], flags: Flags) -> list[ImageShards]:
    """Return the readers; the keys of one set alone have no prefix."""
    paths = [Path(path) for path, _ in sets]
    require_distinct([*paths, *single])
    alone = len(sets) + bool(single) == 1
    archives = [path for path, images in sets if images is None]
    opened = open_archives(archives) if archives else None
    positions = {path: position for position, path in enumerate(archives)}
    inputs: list[ImageShards] = []
    taken = [SINGLE_IMAGES] if single else []
    for name, (path, images) in zip(distinct_names(paths, taken), sets, strict=True):
        if images is None:
            assert opened is not None
            prefix = "" if alone else f"{without_ending(name)}/"
            inputs.append(ImageShards(name, opened, flags, [positions[path]], prefix))
        else:
            count = images.extent if isinstance(images, FolderShards) else None
            if isinstance(images, IndexShards):
                count = len(images.names) * FILES_PER_SHARD  # at most
            inputs.append(ImageShards(name, images, flags, None, "" if alone else f"{name}/", count))
    if single:
        inputs.append(ImageShards(SINGLE_IMAGES, _Files(single), flags, None, "", len(single)))
    return inputs


def _in_folder(folder: Path, is_output: Callable[[Path], bool]) -> list[tuple[str, ShardSet | None]]:
    """Return the archives of a folder, else its images."""
    archives = _archives_in(folder, is_output)
    return [(str(path), None) for path in archives] or [(str(folder), FolderShards(folder, described=True))]


def _archives_in(folder: Path, is_output: Callable[[Path], bool]) -> list[Path]:
    files = list_files(folder)
    return [path for path in files if kind_by_ending(path.name) == "archive" and not is_output(path)]


def _index(path: Path) -> IndexShards:
    if not _first_row(path).get("path"):
        raise UserError(
            f'{shown(path)}: not an image index; expected a field "path" per row. Captions alone are scored'
            " without --captioner, by a scorer of captions"
        )
    return IndexShards(path)


def _lacks_captions(file: str, is_output: Callable[[Path], bool]) -> bool:
    path = Path(file)
    if is_pattern(file):
        return _archive_lacks_captions(list_archives(file)[0])
    if path.is_dir():
        if archives := _archives_in(path, is_output):
            return _archive_lacks_captions(str(archives[0]))
        inside = [other for other in list_files(path) if not is_output(other)]
        kinds = {kind_by_ending(other.name) for other in inside}
        pictured = any(other.suffix.lower() in IMAGE_SUFFIXES for other in inside)
        tables = {"json lines", "parquet"} & kinds
        return pictured and not tables and not has_captions(FolderShards(path, described=True))
    if not path.is_file():
        return False
    match kind_by_ending(file):
        case "image":
            return not read_caption(path)
        case "archive":
            return _archive_lacks_captions(file)
        case "json lines":
            row = _first_row(path)
            return bool(row.get("path")) and not row.get("caption")
    return False


def _archive_lacks_captions(file: str) -> bool:
    try:
        return not any(entry.labels.caption for entry in open_archives([file]).open(0).entries(0))
    except UnreadableShard:
        return False


def _first_row(path: Path) -> dict[str, object]:
    """Return the first row of a file of JSON lines; empty if it is not one."""
    try:
        line = next((line for _, _, line in byte_lines(path) if not is_blank(line)), b"{}")
        return parse_object(line)
    except (OSError, ValueError):
        return {}
