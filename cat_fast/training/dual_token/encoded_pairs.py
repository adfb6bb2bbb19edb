"""Image-text pairs as sequences: encoded once by rank 0, and read from a file by all ranks."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cat_fast.data.files import atomic_write
from cat_fast.data.images.io import load_image
from cat_fast.dual_token.tokenizer import DualTokenizer
from cat_fast.errors import UserError
from cat_fast.training.config.dual_token import LanguageDataConfig
from cat_fast.training.dual_token.pairs import read_pairs

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
        UserError: the index, an image or the tokenizer cannot be used, or the file is of another tokenizer.
    """
    tokenizer = DualTokenizer.from_pretrained(config.tokenizer)
    identity = {"tokenizer": tokenizer.fingerprint(), "grids": config.grids, "index": index, "seed": seed}
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            found = json.loads(file.readline())
        if found != json.loads(json.dumps(identity)):
            raise UserError(
                f"{path}: encoded with other settings ({found}); restore them, or start a new run in another "
                "output_dir"
            )
        return
    records, grids = read_pairs(index, key), config.all_grids
    random = np.random.default_rng([seed, 0, 0, STREAMS[key]])
    with atomic_write(path) as part, part.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(identity) + "\n")
        for record in records:
            grid = grids[int(random.integers(len(grids)))]
            tokens = tokenizer.encode(load_image(record.path), grid)
            row = [record.key, record.caption, tokenizer.vocabulary.flatten(tokens)]
            file.write(json.dumps(row) + "\n")


def read_encoded(path: Path) -> list[EncodedPair]:
    """Return the pairs of a file of `encode_pairs`."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [EncodedPair(*json.loads(line)) for line in lines]
