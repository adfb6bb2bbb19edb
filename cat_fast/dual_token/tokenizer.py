"""`DualTokenizer`: image -> `DualTokens` -> image, and the folder that holds all its parts.

    tokenizer = DualTokenizer.from_pretrained("runs/dual/tokenizer")
    tokens = tokenizer.encode(image, grid=8)
    ids = tokenizer.vocabulary.flatten(tokens)
    image = tokenizer.decode(tokens, size=(256, 256))

A folder holds `dual_tokenizer.json` and one subfolder per part, `guide/` and `semantic/`. The diffusion model
is referred to by its name or folder, and opened when an image is first decoded.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from cat_fast.data.files import require_writable, write_json
from cat_fast.data.images.io import image_to_tensor, tensor_to_image
from cat_fast.dual_token.grid import Grid, as_grid
from cat_fast.dual_token.guide.model import GuideModel
from cat_fast.dual_token.rerender.backend import Backend, Size
from cat_fast.dual_token.rerender.open import open_backend
from cat_fast.dual_token.rerender.rerender import RerenderSettings, rerender
from cat_fast.dual_token.resize import resize
from cat_fast.dual_token.semantic.model import SemanticModel
from cat_fast.dual_token.sequence import Vocabulary
from cat_fast.dual_token.tokens import DualTokens
from cat_fast.errors import UserError, first_line
from cat_fast.models.load import load_model

INDEX = "dual_tokenizer.json"
GUIDE, SEMANTIC = "guide", "semantic"
_CLASS = "DualTokenizer"


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Reference to the diffusion model that re-renders guides."""

    model: str
    """Its folder, or the name of one that ships with the package, such as `nano`."""
    ratio: int | None = None
    """Compression ratio, for pipelines of this package; None for the lowest."""

    def __post_init__(self) -> None:
        if not self.model or (self.ratio is not None and type(self.ratio) is not int):
            raise UserError(f"renderer: expected a name or folder, and a ratio or none, got {self}")


class DualTokenizer:
    """The parts of a dual-token tokenizer, in evaluation mode.

    Args:
        guide: model of the guide.
        semantic: model of the semantic codes; without it, images have a guide only.
        renderer: diffusion model of `decode`; without it, only guides can be decoded.
        renderer_dtype: dtype of the diffusion model; the other parts run in that of their weights.
        max_side: maximum height and width of a guide in tokens, part of the vocabulary.
    """

    def __init__(
        self,
        guide: GuideModel,
        semantic: SemanticModel | None = None,
        renderer: Renderer | None = None,
        *,
        renderer_dtype: torch.dtype = torch.float32,
        max_side: int = 64,
    ) -> None:
        self.guide = guide.eval()
        self.semantic = None if semantic is None else semantic.eval()
        self.renderer, self.renderer_dtype = renderer, renderer_dtype
        self.max_side = max_side
        self._backend: Backend | None = None

    @property
    def device(self) -> torch.device:
        return self.guide.device

    @property
    def vocabulary(self) -> Vocabulary:
        """Map between codes and the ids of a flat sequence."""
        semantic = self.semantic
        return Vocabulary(
            semantic_length=0 if semantic is None else semantic.num_queries,
            semantic_size=0 if semantic is None else semantic.codebook_size,
            guide_size=self.guide.codebook_size,
            max_side=self.max_side,
        )

    @property
    def backend(self) -> Backend:
        """The diffusion model, opened at first use.

        Raises:
            UserError: the tokenizer has none, it cannot be opened, or the semantic codes were trained for
                another text encoder.
        """
        if self._backend is None:
            if self.renderer is None:
                raise UserError(
                    "this tokenizer has no diffusion model: name one, such as nano, or decode guides alone"
                )
            states = 77 if self.semantic is None else self.semantic.config["num_states"]
            opened = open_backend(
                self.renderer.model,
                str(self.device),
                self.renderer_dtype,
                ratio=self.renderer.ratio,
                num_states=states,
            )
            self._check_text(opened)
            self._backend = opened
        return self._backend

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
                found[i] = DualTokens(self._semantic_codes(tensors[i]), codes)
        return [tokens for tokens in found if tokens is not None]

    def decode(
        self,
        tokens: DualTokens,
        size: Size | None = None,
        settings: RerenderSettings | None = None,
        seed: int = 0,
    ) -> Image.Image:
        """Return the re-rendered image of one image's codes; see `decode_batch`."""
        return tensor_to_image(self.decode_batch([tokens], size, settings, [seed])[0])

    def decode_batch(
        self,
        batch: Sequence[DualTokens],
        size: Size | None = None,
        settings: RerenderSettings | None = None,
        seeds: Sequence[int] | None = None,
        on_step: Callable[[], Any] = lambda: None,
    ) -> Tensor:
        """Return re-rendered images (B, 3, H, W) in [-1, 1], whose guides may differ in size.

        Args:
            size: height and width in pixels, independent of the number of tokens; None for the size that the
                diffusion model was trained on.
            settings: steps, strength, guidance and ablations; see `RerenderSettings`.
            seeds: one per image, for modes that draw noise.
            on_step: called after each step.

        Raises:
            UserError: codes outside the vocabulary, a missing part, a size that the model cannot draw.
                Nothing is decoded then.
        """
        settings = settings or RerenderSettings()
        for tokens in batch:
            self.vocabulary.check(tokens)
        backend = self.backend
        size = size or backend.default_size
        backend.check_size(size)
        guides, conditions = None, None
        if settings.mode != "semantic":
            guides = torch.cat([resize(guide[None], size) for guide in self.decode_guides(batch)])
        if settings.mode in ("full", "semantic"):
            conditions = self._conditions(batch)
        return rerender(backend, guides, conditions, size, settings, seeds, on_step)

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
        if self.semantic is not None:
            parts[SEMANTIC] = self.semantic.fingerprint()
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the parts and, last, the index; an interrupted save is not taken for a tokenizer.

        Raises:
            UserError: the folder cannot be written.
        """
        index = Path(folder) / INDEX
        require_writable(index)
        index.unlink(missing_ok=True)
        self.guide.save_pretrained(Path(folder) / GUIDE)  # type: ignore[call-arg, arg-type]
        parts = [GUIDE]
        if self.semantic is not None:
            self.semantic.save_pretrained(Path(folder) / SEMANTIC)  # type: ignore[call-arg, arg-type]
            parts.append(SEMANTIC)
        content: dict[str, Any] = {"_class_name": _CLASS, "max_side": self.max_side, "parts": parts}
        content["renderer"] = None if self.renderer is None else asdict(self.renderer)
        write_json(index, content)

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
        semantic = None
        if SEMANTIC in index["parts"]:
            semantic = load_model(SemanticModel, "semantic branch", path / SEMANTIC, device)
        guide = load_model(GuideModel, "guide", path / GUIDE, device)
        renderer = index.get("renderer")
        try:
            own = None if renderer is None else Renderer(**renderer)
        except (TypeError, UserError) as error:
            raise UserError(f"{path / INDEX}: renderer: not valid ({first_line(error)})") from error
        return cls(guide, semantic, own, max_side=index["max_side"])

    def _semantic_codes(self, image: Tensor) -> Tensor:
        if self.semantic is None:
            return torch.empty(0, dtype=torch.int64)
        return self.semantic.encode(image[None])[0].cpu()

    def _conditions(self, batch: Sequence[DualTokens]) -> list[Tensor]:
        """Return the text states that the semantic codes of each image stand for."""
        if self.semantic is None or not all(tokens.semantic.numel() for tokens in batch):
            raise UserError(
                "semantic codes: none to condition on; use the mode unconditioned, or decode the guide alone"
            )
        codes = torch.stack([tokens.semantic for tokens in batch]).to(self.device)
        return [states.float() for states in self.semantic.decode(codes)]

    def _check_text(self, backend: Backend) -> None:
        if self.semantic is None:
            return
        trained, own = self.semantic.config["text_fingerprint"], backend.text_target.fingerprint()
        if trained not in (None, own):
            raise UserError(
                f"{backend.name}: its text encoder is {own}, but the semantic codes were trained for"
                f" {trained}; use the diffusion model of that training (text_target)"
            )

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
    if parts not in ([GUIDE], [GUIDE, SEMANTIC]) or type(side) is not int or side < 1:
        raise UserError(f"{path}: has parts or settings that this version does not know: {index}")
    return index
