"""Sidecar files with a shard's labels: `shard-000123.scores.jsonl` or `.scores.parquet`, read with the shard.

A JSON line is an object with "key" and "score" (1 to 9), "ratio" (8, 16, 32) or both. "expected" is the score
before rounding, for thresholds that are not integers, and "scored_by" its scorer (`ScoredBy`). "has_text"
disables horizontal flips; "has_faces", "caption" and "category" are used when latents are encoded. Parquet
files have columns of the same names. Labels follow the rules of `given_labels`.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cat_fast.data.files import atomic_write
from cat_fast.data.images.label_fields import given_labels, required_text
from cat_fast.data.images.label_table import label_rows
from cat_fast.data.streams.formats.base import ARCHIVE_SUFFIXES
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.formats.remote import Remote
from cat_fast.data.streams.formats.tar_index import normal_name
from cat_fast.data.text_files import is_blank, parse_object

JSON_LINES, PARQUET = ".scores.jsonl", ".scores.parquet"


def sidecar_url(shard: str, suffix: str = JSON_LINES) -> str:
    """Return the URL of the sidecar of an archive, `…/shard-000123.scores.jsonl` of `…/shard-000123.tar`."""
    archive = next((end for end in ARCHIVE_SUFFIXES if shard.lower().endswith(end)), "")
    return f"{shard[: len(shard) - len(archive)]}{suffix}"


def read_sidecar(shard: str, remote: Remote, problems: ProblemLog) -> dict[str, dict[str, Any]] | None:
    """Return the labels that a sidecar sets (`given_labels`), by key; None without a sidecar.

    Invalid lines are reported and skipped.

    Raises:
        UnreadableShard: the sidecar cannot be read.
    """
    for suffix, parse in ((JSON_LINES, _json_lines), (PARQUET, _table)):
        url = sidecar_url(shard, suffix)
        content = remote.read_if_exists(url)
        if content is not None:
            return parse(content, url, problems)
    return None


def sidecar_digest(shard: str, remote: Remote) -> str | None:
    """Return a hash of the sidecar's content; None without a sidecar.

    Raises:
        UnreadableShard: the sidecar cannot be read.
    """
    for suffix in (JSON_LINES, PARQUET):
        content = remote.read_if_exists(sidecar_url(shard, suffix))
        if content is not None:
            return hashlib.blake2b(content, digest_size=8).hexdigest()
    return None


def write_sidecar(shard: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines next to `shard`, atomically."""
    with atomic_write(sidecar_url(str(shard))) as part:
        lines = (json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
        part.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def _json_lines(content: bytes, url: str, problems: ProblemLog) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if is_blank(line):
            continue
        where = f"{url}, line {number}"
        try:
            found |= _labels_by_key(parse_object(line), where, problems)
        except ValueError as error:
            problems.report(where, str(error))
    return found


def _table(content: bytes, url: str, problems: ProblemLog) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    try:
        rows = list(label_rows(io.BytesIO(content), ("key",)))
    except OSError as error:
        problems.report(url, str(error))
        return {}
    for number, row in enumerate(rows):
        where = f"{url}, row {number}"
        try:
            found |= _labels_by_key(row, where, problems)
        except ValueError as error:
            problems.report(where, str(error))
    return found


def _labels_by_key(row: Mapping[str, Any], where: str, problems: ProblemLog) -> dict[str, dict[str, Any]]:
    key = normal_name(required_text(row, "key"))
    return {key: given_labels(row, lambda label, why: problems.report(f"{where}: {label}", why))}
