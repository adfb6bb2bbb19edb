"""Identity of the tokenizer that a latent folder was made with, without loading it.

    tokenizer.json    its fingerprint and scale; path, size and modification time of each of its files

A tokenizer whose files are recorded and unchanged is not loaded to compare it with that of a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cat_fast.data.files import write_json
from cat_fast.data.input_samples import file_stamp
from cat_fast.data.latents.format import read_json

if TYPE_CHECKING:
    from cat_fast.tokenizer import NestedAutoencoderKL

RECORD = "tokenizer.json"


class TokenizerIdentity(NamedTuple):
    """Fingerprint and scale of a tokenizer, as a latent folder stores them."""

    fingerprint: str
    scale: dict[str, Any] | None
    """Its own scale, as of `LatentScale.to_json`."""

    @classmethod
    def of(cls, tokenizer: NestedAutoencoderKL) -> TokenizerIdentity:
        """Return the identity of a loaded tokenizer."""
        from cat_fast.tokenizer.pipeline_config import latent_scale

        return cls(tokenizer.latents_fingerprint(), latent_scale(tokenizer).to_json())


def recorded_identity(folder: Path, checkpoint: Path) -> TokenizerIdentity | None:
    """Return the identity of a tokenizer whose files a latent folder has recorded, unless they changed."""
    files = _files(checkpoint)
    if not files or not (folder / RECORD).is_file():
        return None
    record = read_json(folder / RECORD)
    return TokenizerIdentity(**record["identity"]) if record["files"] == files else None


def record_identity(folder: Path, checkpoint: Path, identity: TokenizerIdentity) -> None:
    """Record the files of the tokenizer of a latent folder; other machines may have copies of them."""
    if (files := _files(checkpoint)) and recorded_identity(folder, checkpoint) != identity:
        write_json(folder / RECORD, {"identity": identity._asdict(), "files": files})


def _files(checkpoint: Path) -> list[list[Any]]:
    """Return path, size and modification time of a checkpoint's files; of none for a name on the hub."""
    inside = sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]
    return [[str(path.resolve()), *file_stamp(str(path))] for path in inside if path.is_file()]
