"""Image-text pairs as sequences: encoded once by rank 0, and read from a file by all ranks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cat_fast.data.files import atomic_write
from cat_fast.data.images.io import load_image
from cat_fast.dual_token.tokenizer import DualTokenizer
from cat_fast.errors import UserError
from cat_fast.training.checkpoints.initial_settings import require_same_settings
from cat_fast.training.config.dual_token import LanguageDataConfig
from cat_fast.training.dual_token.pairs import pairs_identity, read_pairs

STREAMS = {"data.index": 11, "data.held_out": 14}
"""Random stream of the guide sizes, by the setting that names the images."""


class EncodedPair(NamedTuple):
    """A sequence and its caption."""

    key: str
    caption: str
    ids: list[int]


def encode_pairs(path: Path, index: str, key: str, config: LanguageDataConfig, seed: int) -> None:
    """Encode the images of an index to a file, unless it is there.

    The guide size of an image is drawn from the seed, the key and its place.

    Args:
        key: setting that names the index, one of `STREAMS`.

    Raises:
        UserError: the index, an image or the tokenizer cannot be used, or the file is of other pairs, another
            tokenizer or other settings.
    """
    tokenizer = DualTokenizer.from_pretrained(config.tokenizer)
    records, grids = read_pairs(index, key), config.all_grids
    identity: dict[str, Any] = {
        "tokenizer": tokenizer.fingerprint(),
        "grids": config.grids,
        "seed": seed,
        **pairs_identity(((record.key, record.caption) for record in records), key),
    }
    if path.is_file():
        _require_same(path, identity, key)
        return
    random = np.random.default_rng([seed, 0, 0, STREAMS[key]])
    with atomic_write(path) as part, part.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(identity) + "\n")
        for record in records:
            grid = grids[int(random.integers(len(grids)))]
            tokens = tokenizer.encode(load_image(record.path), grid)
            row = [record.key, record.caption, tokenizer.vocabulary.flatten(tokens)]
            file.write(json.dumps(row) + "\n")


def _require_same(path: Path, identity: Mapping[str, Any], key: str) -> None:
    with path.open(encoding="utf-8") as file:
        found = json.loads(file.readline())
    if "index" in found:  # by an earlier version, which identified the pairs by the path of their index
        found |= pairs_identity(((pair.key, pair.caption) for pair in read_encoded(path)), key)
    try:
        require_same_settings(found, identity)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_encoded(path: Path) -> list[EncodedPair]:
    """Return the pairs of a file of `encode_pairs`."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [EncodedPair(*json.loads(line)) for line in lines]
