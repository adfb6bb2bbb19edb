"""Writing of latent shards; `format` describes their files."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from cat_fast.data.files import atomic_write, sha256, write_json
from cat_fast.data.latents.format import MOMENTS, SUFFIXES, LatentEntry
from cat_fast.data.latents.moments import Moments
from cat_fast.data.shard_writer import member_name
from cat_fast.errors import UserError


def write_shard(
    path: Path,
    latents: Mapping[str, torch.Tensor],
    entries: Sequence[LatentEntry],
    fingerprint: str,
    **more: Any,
) -> dict[str, Any]:
    """Write a shard atomically, then its commit record, and return the record.

    Args:
        path: file name; its extension selects the format (`SUFFIXES`).
        latents: (c, h, w) float32, by the keys of `entries`.
        fingerprint: fingerprint of the tokenizer that encoded them.
        more: additional entries of the record.

    Raises:
        UserError: the shard cannot be written.
    """
    path.with_suffix(".json").unlink(missing_ok=True)  # the record of a lost shard must not validate this one
    for stale in path.parent.glob(f".{path.stem}.*.part"):  # left by a killed process
        stale.unlink(missing_ok=True)
    with atomic_write(path) as part:
        if path.suffix == SUFFIXES["webdataset"]:
            _write_tar(part, latents, entries, fingerprint)
        else:
            try:
                save_file(dict(latents), part, metadata={"tokenizer": fingerprint})
            except SafetensorError as error:  # raised for a full disk
                raise UserError(f"{path}: cannot be written ({error})") from error
    moments = Moments.by_group((entry.ratio, latents[entry.key]) for entry in entries)
    record = {
        "shard": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "fingerprint": fingerprint,
        MOMENTS: {str(ratio): asdict(found) for ratio, found in moments.items()},
        **more,
        "latents": [asdict(entry) for entry in entries],
    }
    write_json(path.with_suffix(".json"), record)
    return record


def _write_tar(
    part: Path, latents: Mapping[str, torch.Tensor], entries: Sequence[LatentEntry], fingerprint: str
) -> None:
    from webdataset import TarWriter

    names: set[str] = set()
    with part.open("wb") as file, TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as archive:
        for entry in entries:
            name = member_name(entry.key, names)
            names.add(name)
            array = io.BytesIO()
            np.save(array, latents[entry.key].numpy(), allow_pickle=False)
            own = asdict(entry) | {"tokenizer": fingerprint}
            archive.write(
                {
                    "__key__": name,
                    "npy": array.getvalue(),
                    "cls": str(entry.label).encode(),
                    "json": json.dumps(own, ensure_ascii=False).encode(),
                }
            )
