"""Building of the corpus: fetch, unpack, write images, split, index."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from cat_fast.data.corpus.deb import unpack
from cat_fast.data.corpus.packages import PACKAGES, DebianPackage, Unavailable, obtain, require_source
from cat_fast.data.corpus.sources import SOURCES, CorpusImage, Source
from cat_fast.data.files import atomic_write, write_json
from cat_fast.data.folder_lock import locked
from cat_fast.data.images.index import ImageRecord, write_index
from cat_fast.errors import UserError

HELD_OUT_SHARE = 0.05
CARD = "corpus.json"
INDICES = {"train": "train.jsonl", "held_out": "held_out.jsonl"}
"""Image indices of the splits, in the corpus folder."""

_ROW = ("caption", "group", "category", "has_text", "has_faces", "split")
"""Fields of a `CorpusImage` that are stored."""
_UNPACKED = ".unpacked-"
"""Prefix of the temporary folders of unpacked packages."""
Progress = Callable[[str, int], None]
"""Receives a description of the current step, and images written since the last call."""


@dataclass
class CorpusReport:
    """Contents of a corpus, and what is missing from it."""

    images: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of images per source and split."""
    packages: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that were used."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Reason per package or file that was left out."""
    licences: dict[str, str] = field(default_factory=dict)
    """Licence per source."""
    shown: list[str] = field(default_factory=list)
    """Sources whose images may be published with this project."""


def build_corpus(
    folder: Path,
    *,
    given: Path | None = None,
    only: Sequence[str] = (),
    progress: Progress = lambda step, images: None,
) -> CorpusReport:
    """Write the images of all sources, train.jsonl, held_out.jsonl and corpus.json to a folder.

    A source that is complete is kept, so that the same call continues after an interruption. A package that
    is gone or changed is left out, and its source is built from the others, or left out, too.

    Args:
        given: folder of .deb files to take instead of downloading.
        only: names of sources; all if empty. Other sources that the folder holds stay in the indices.

    Raises:
        UserError: an unknown source, a folder that cannot be written, too little disk space, or no way to
            obtain packages.
    """
    sources = [_source(name) for name in only] or list(SOURCES.values())
    packages = [PACKAGES[name] for source in sources for name in source.packages]
    require_source(packages, folder / "packages", given)
    report = CorpusReport()
    with locked(folder, "building the corpus"):
        for stale in folder.glob(f"{_UNPACKED}*"):  # left by a killed process
            shutil.rmtree(stale, ignore_errors=True)
        pending = [source for source in sources if not _is_complete(folder, source)]
        require_space(folder, disk_needed(pending, downloads=given is None))
        for source in pending:
            _build_source(folder, source, given, report, progress)
        _write_indices(folder, report)
    return report


def disk_needed(sources: Sequence[Source], *, downloads: bool) -> int:
    """Return the disk space that building the sources takes at most, bytes."""
    packages = [PACKAGES[name] for source in sources for name in source.packages]
    return sum(s.disk for s in sources) + downloads * sum(p.size for p in packages)


def require_space(folder: Path, needed: int) -> None:
    """Raise UserError if the folder's disk has less free space than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: the corpus needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; choose"
            " another disk, or fewer sources with --only"
        )


def split_of(source: str, group: str) -> str:
    """Return the split of a group of images, by a hash of its name: the same in every corpus."""
    digest = sha256(f"{source}/{group}".encode("utf-8", "surrogatepass")).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64 else "train"


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise UserError(f"--only {name}: expected one of {', '.join(SOURCES)}")
    return SOURCES[name]


def _header(source: Source, packages: Sequence[DebianPackage]) -> dict[str, Any]:
    return {
        "source": source.name,
        "version": source.version,
        "packages": {p.name: p.version for p in packages},
    }


def _rows_file(folder: Path, source: Source) -> Path:
    return folder / "images" / source.name / "rows.json"


def _is_complete(folder: Path, source: Source) -> bool:
    """Return True if the source was built from all of its packages, by this version."""
    try:
        rows = json.loads(_rows_file(folder, source).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return rows["header"] == _header(source, [PACKAGES[name] for name in source.packages])


def _build_source(
    folder: Path, source: Source, given: Path | None, report: CorpusReport, progress: Progress
) -> None:
    files: dict[str, Path] = {}
    for name in source.packages:
        progress(f"{source.name}: {name}", 0)
        try:
            files[name] = obtain(PACKAGES[name], folder / "packages", given)
        except Unavailable as error:
            report.left_out[name] = str(error)
    target = folder / "images" / source.name
    shutil.rmtree(target, ignore_errors=True)
    if source.packages and not files:
        return
    target.mkdir(parents=True)
    problems: dict[str, str] = {}
    rows = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=_UNPACKED) as unpacked:
        for name, file in files.items():
            unpack(file, Path(unpacked) / name, source.patterns)
        for image in source.images(Path(unpacked), problems.__setitem__):
            rows.append(_write_image(target, source, image))
            progress(source.name, 1)
    header = _header(source, [PACKAGES[name] for name in files])
    write_json(_rows_file(folder, source), {"header": header, "left_out": problems, "rows": rows})


def _write_image(target: Path, source: Source, image: CorpusImage) -> dict[str, Any]:
    path = target / f"{image.name}.{'png' if source.lossless else 'jpg'}"
    options = {} if source.lossless else {"quality": 95, "subsampling": 0}
    with atomic_write(path, flush=False) as part:
        image.image.save(part, "PNG" if source.lossless else "JPEG", **options)
    return {name: getattr(image, name) for name in _ROW} | {"file": path.name}


def _write_indices(folder: Path, report: CorpusReport) -> None:
    """Index the images of all complete sources in the folder, and write the card."""
    splits: dict[str, list[ImageRecord]] = {name: [] for name in INDICES}
    for source in SOURCES.values():
        if not _rows_file(folder, source).exists():
            continue
        content = json.loads(_rows_file(folder, source).read_text(encoding="utf-8"))
        counts: Counter[str] = Counter()
        for row in content["rows"]:
            split = row.get("split") or split_of(source.name, row["group"])
            counts[split] += 1
            record = _record(source, row)
            splits[split].append(record)
            if split == "train":
                splits[split] += [
                    replace(record, key=f"{record.key}~{i}") for i in range(2, 1 + source.repeats)
                ]
        report.images[source.name] = {name: counts[name] for name in INDICES}
        report.packages |= content["header"]["packages"]
        report.left_out |= content["left_out"]
        report.licences[source.name] = source.licence
        report.shown += [source.name] * source.shown
    if not any(splits.values()):
        raise UserError(
            "no package could be obtained: "
            + "; ".join(f"{name}: {reason}" for name, reason in report.left_out.items())
        )
    for name, file in INDICES.items():
        write_index(folder / file, splits[name])
    write_json(folder / CARD, asdict(report))


def _record(source: Source, row: dict[str, Any]) -> ImageRecord:
    return ImageRecord(
        key=f"{source.name}/{Path(row['file']).stem}",
        path=f"images/{source.name}/{row['file']}",
        caption=row["caption"],
        has_text=row["has_text"],
        has_faces=row["has_faces"],
        category=f"{source.name}/{row['category']}",
        score=None,
        ratio=None,
    )
