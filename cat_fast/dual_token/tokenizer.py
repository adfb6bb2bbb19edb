"""`DualTokenizer`: image -> `DualTokens` -> image, and the folder that holds all its parts.

    tokenizer = DualTokenizer.from_pretrained("runs/dual/tokenizer")
    tokens = tokenizer.encode(image, grid=8)
    ids = tokenizer.vocabulary.flatten(tokens)
    guide = tokenizer.decode_guide(tokens)

A folder holds `dual_tokenizer.json` and one subfolder per part: `guide/`.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from cat_fast.data.files import require_writable, write_json
from cat_fast.data.images.io import image_to_tensor, tensor_to_image
from cat_fast.dual_token.grid import Grid, as_grid
from cat_fast.dual_token.guide.model import GuideModel
from cat_fast.dual_token.sequence import Vocabulary
from cat_fast.dual_token.tokens import DualTokens
from cat_fast.errors import UserError, first_line
from cat_fast.models.load import load_model

INDEX = "dual_tokenizer.json"
GUIDE = "guide"
_CLASS = "DualTokenizer"


class DualTokenizer:
    """The parts of a dual-token tokenizer, in evaluation mode.

    Args:
        guide: model of the guide.
        max_side: maximum height and width of a guide in tokens, part of the vocabulary.
    """

    def __init__(self, guide: GuideModel, *, max_side: int = 64) -> None:
        self.guide = guide.eval()
        self.max_side = max_side

    @property
    def device(self) -> torch.device:
        return self.guide.device

    @property
    def vocabulary(self) -> Vocabulary:
        """Map between codes and the ids of a flat sequence."""
        return Vocabulary(
            semantic_length=0,
            semantic_size=0,
            guide_size=self.guide.codebook_size,
            max_side=self.max_side,
        )

    def encode(self, image: Image.Image | Tensor, grid: int | Grid = 8) -> DualTokens:
        """Return the codes of one image; see `encode_batch`."""
        return self.encode_batch([image], grid)[0]

    def encode_batch(
        self, images: Sequence[Image.Image | Tensor], grid: int | Grid | Sequence[int | Grid] = 8
    ) -> list[DualTokens]:
        """Return the codes of images of any sizes.

        An image is resized to the size that its grid requires, whatever its aspect ratio.

        Args:
            images: RGB images, or (3, H, W) tensors in [-1, 1].
            grid: height and width of the guide in tokens, or the side of a square one; a list has one per
                image.

        Raises:
            UserError: an image smaller than its guide, an invalid grid, or another number of grids.
        """
        grids = _one_per_image(grid, len(images))
        found: list[DualTokens | None] = [None] * len(images)
        tensors = [self._as_tensor(image) for image in images]
        for x, own in zip(tensors, grids, strict=True):
            self._check(x, own)
        for one in dict.fromkeys(grids):  # images of one grid share a forward pass
            rows = [i for i, own in enumerate(grids) if own == one]
            inputs = torch.cat([self.guide.resize_input(tensors[i][None], one) for i in rows])
            for i, codes in zip(rows, self.guide.encode(inputs).cpu(), strict=True):
                found[i] = DualTokens(torch.empty(0, dtype=torch.int64), codes)
        return [tokens for tokens in found if tokens is not None]

    def decode_guide(self, tokens: DualTokens) -> Image.Image:
        """Return the guide of one image, `guide.scale` pixels per token and side."""
        return tensor_to_image(self.decode_guides([tokens])[0])

    def decode_guides(self, batch: Sequence[DualTokens]) -> list[Tensor]:
        """Return the guides (3, h, w) in [-1, 1] of images, whose grids may differ.

        Raises:
            UserError: codes outside the codebook, or an image without a guide. Nothing is decoded then.
        """
        for tokens in batch:
            self.vocabulary.check(tokens)
            if not tokens.guide.numel():
                raise UserError("guide codes: expected a grid, got none")
        found: list[Tensor | None] = [None] * len(batch)
        for one in dict.fromkeys(tokens.grid for tokens in batch):
            rows = [i for i, tokens in enumerate(batch) if tokens.grid == one]
            codes = torch.stack([batch[i].guide for i in rows]).to(self.device)
            for i, guide in zip(rows, self.guide.decode(codes).float().clamp(-1, 1), strict=True):
                found[i] = guide
        return [guide for guide in found if guide is not None]

    def fingerprint(self) -> str:
        """Return 16 hex digits that identify the parts that codes depend on; stored with them."""
        parts = {GUIDE: self.guide.fingerprint()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the parts and, last, the index; an interrupted save is not taken for a tokenizer.

        Raises:
            UserError: the folder cannot be written.
        """
        index = Path(folder) / INDEX
        require_writable(index)
        index.unlink(missing_ok=True)
        self.guide.save_pretrained(Path(folder) / GUIDE)
        write_json(index, {"_class_name": _CLASS, "max_side": self.max_side, "parts": [GUIDE]})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], device: str = "auto") -> Self:
        """Load a folder that `save_pretrained` wrote, or the folder of a trained guide alone.

        Raises:
            UserError: the folder is of another class, incomplete or damaged, or the device is not available.
        """
        path = Path(folder)
        if not (path / INDEX).exists() and (path / "config.json").is_file():
            return cls(load_model(GuideModel, "guide", path, device))
        index = _read_index(path)
        return cls(load_model(GuideModel, "guide", path / GUIDE, device), max_side=index["max_side"])

    def _as_tensor(self, image: Image.Image | Tensor) -> Tensor:
        x = image if isinstance(image, Tensor) else image_to_tensor(image)
        if x.ndim != 3 or x.shape[0] != 3:
            raise UserError(f"image: expected (3, H, W), got {tuple(x.shape)}")
        return x.to(self.device, torch.float32)

    def _check(self, image: Tensor, grid: Grid) -> None:
        if max(grid) > self.max_side:
            raise UserError(f"grid: expected at most {self.max_side} tokens per side, got {max(grid)}")
        self.guide.require_large_enough(image.shape[1], image.shape[2], grid)


def _one_per_image(grid: int | Grid | Sequence[int | Grid], count: int) -> list[Grid]:
    if isinstance(grid, list):
        if len(grid) != count:
            raise UserError(f"grid: expected one per image, {count} in all, got {len(grid)}")
        return [as_grid(one) for one in grid]
    return [as_grid(grid)] * count


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        inside = sorted(folder.glob(f"*/{INDEX}")) if folder.is_dir() else []
        hint = f"; did you mean {inside[0].parent}?" if inside else ""
        raise UserError(
            f"{folder}: {'no such folder' if not folder.exists() else f'{INDEX} is missing'}; expected the"
            f" folder of a dual-token tokenizer, or of a trained guide{hint}"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found, parts, side = index["_class_name"], index["parts"], index["max_side"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the index of a dual-token tokenizer ({first_line(error)})") from error
    if found != _CLASS:
        raise UserError(f"{path}: expected the index of a {_CLASS}, got that of a {found}")
    if parts != [GUIDE] or type(side) is not int or side < 1:
        raise UserError(f"{path}: has parts or settings that this version does not know: {index}")
    return index
