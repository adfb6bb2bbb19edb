"""Scores beside a shard: `shard-000123.scores.jsonl` or `.scores.parquet`, read when the shard is opened.

A line is an object with "key" and one or both of "score" (1 to 9) and "ratio" (8, 16, 32); "has_text"
keeps an image from being mirrored; "has_faces", "caption" and "category" are for whoever makes latents of them.
Other fields are passed over. Columns likewise. What is missing or null is not said.
"""

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from cat_fast.data.files import atomic_write
from cat_fast.data.streams.formats.base import LABELS, labels_said
from cat_fast.data.streams.formats.problems import Problems
from cat_fast.data.streams.formats.remote import Remote

JSON_LINES, PARQUET = ".scores.jsonl", ".scores.parquet"


def sidecar_url(shard: str, suffix: str = JSON_LINES) -> str:
    """The sidecar of `…/shard-000123.tar`; of `.tar.gz` too."""
    folder, slash, name = shard.rpartition("/")
    return f"{folder}{slash}{name.split('.tar')[0]}{suffix}"


def read_sidecar(shard: str, remote: Remote, problems: Problems) -> dict[str, dict[str, Any]] | None:
    """The labels that it says (`labels_said`), by key; None if the shard has no sidecar. Broken lines are
    reported and left out.

    Raises:
        UnreadableShard: it may be there, but cannot be read.
    """
    for suffix, parse in ((JSON_LINES, _json_lines), (PARQUET, _table)):
        url = sidecar_url(shard, suffix)
        content = remote.read_if_there(url)
        if content is not None:
            return parse(content, url, problems)
    return None


def write_sidecar(shard: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines beside `shard`, whole or not at all."""
    with atomic_write(sidecar_url(str(shard))) as part:
        part.write_text(
            "".join(json.dumps(dict(r), ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
        )


def _json_lines(content: bytes, url: str, problems: Problems) -> dict[str, dict[str, Any]]:
    found = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            found[str(fields["key"])] = labels_said(fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.report(f"{url}, line {number}", f"{type(error).__name__}: {error}")
    return found


def _table(content: bytes, url: str, problems: Problems) -> dict[str, dict[str, Any]]:
    found = {}
    try:
        there = pyarrow.parquet.read_schema(io.BytesIO(content)).names
        columns = [name for name in ("key", *LABELS) if name in there]
        rows = pyarrow.parquet.read_table(io.BytesIO(content), columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        problems.report(url, str(error))
        return {}
    for number, row in enumerate(rows):
        try:
            found[str(row["key"])] = labels_said(row)
        except (ValueError, KeyError, TypeError) as error:
            problems.report(f"{url}, row {number}", f"{type(error).__name__}: {error}")
    return found
