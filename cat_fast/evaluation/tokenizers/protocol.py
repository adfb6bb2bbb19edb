"""Interface of evaluated tokenizers, and its implementations: ours, diffusers', one-dimensional ones.

A new tokenizer is a class with the members of `ImageTokenizer` and a branch in `open_tokenizer`.
"""

import copy
import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cat_fast.errors import UserError, one_line
from cat_fast.models.load import load_tokenizer
from cat_fast.tokenizer.pipeline_config import upcast
from cat_fast.weights.fingerprint import fingerprint

FLOPS_UNIT = "floating-point operations of encoder and decoder per image; a multiply-accumulate is two"


class ImageTokenizer(Protocol):
    """A tokenizer, at one or several rates."""

    name: str
    choices: tuple[int, ...]
    """Its rates: downsampling ratios, or numbers of tokens of a one-dimensional tokenizer."""
    is_spatial: bool
    """True if `choices` are downsampling ratios."""

    def reconstruct(self, images: Tensor, choice: int) -> Tensor:
        """Return reconstructions of images (B, 3, H, W) in [-1, 1], of the same shape."""
        ...

    def encode(self, images: Tensor, choice: int) -> Tensor:
        """Return the latents of images, (B, c, h, w) float32.

        Raises:
            UserError: the tokenizer has no spatial latents.
        """
        ...

    def positions(self, choice: int, side: int) -> int:
        """Return the number of latent positions of an image, before patching."""
        ...

    def flops(self, choice: int, side: int) -> int | None:
        """Return the operations per image (`FLOPS_UNIT`), None if they cannot be counted."""
        ...

    def record(self) -> dict[str, Any]:
        """Return its identity for results, as JSON."""
        ...


class NestedTokenizer:
    """Our nested VAE, and everything that `load_tokenizer` converts to it."""

    is_spatial = True

    def __init__(self, name: str, source: Path, device: str) -> None:
        self.name, self.source = name, source
        self.model = load_tokenizer(source, device)
        self.choices: tuple[int, ...] = tuple(self.model.ratios)
        self.flops = lru_cache(self._flops)

    def reconstruct(self, images: Tensor, choice: int) -> Tensor:
        with torch.inference_mode(), upcast(self.model):
            latents = self.encode(images, choice).to(self.model.dtype)
            return self.model.decode(latents, choice).sample.float()

    def encode(self, images: Tensor, choice: int) -> Tensor:
        with torch.inference_mode(), upcast(self.model):
            x = images.to(self.model.device, self.model.dtype)
            return self.model.encode(x, choice).latent_dist.mode().float()

    def positions(self, choice: int, side: int) -> int:
        return (side // choice) ** 2

    def _flops(self, choice: int, side: int) -> int:
        model = copy.deepcopy(self.model).to("meta")
        return count_flops(lambda x: model.decode(model.encode(x, choice).latent_dist.mode(), choice), side)

    def record(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": str(self.source),
            "fingerprint": self.model.fingerprint(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "latent_channels": self.model.config["latent_channels"],
            "latents": "mode of the posterior",
        }


class DiffusersTokenizer:
    """An `AutoencoderKL` or `AutoencoderDC` of diffusers, as it is."""

    is_spatial = True

    def __init__(self, name: str, source: Path, device: str) -> None:
        import diffusers

        from cat_fast.models.device import find_device

        self.name, self.source = name, source
        self.kind = json.loads((source / "config.json").read_text(encoding="utf-8"))["_class_name"]
        kind: Any = getattr(diffusers, self.kind)
        try:
            self.model = kind.from_pretrained(source, local_files_only=True).eval().to(find_device(device))
        except Exception as error:  # missing, damaged and mismatched files raise different exceptions
            raise UserError(f"{source}: cannot be loaded ({one_line(error)[:200]})") from error
        self.choices: tuple[int, ...] = (self._ratio(),)
        self.flops = lru_cache(self._flops)

    def reconstruct(self, images: Tensor, choice: int) -> Tensor:
        with torch.inference_mode():
            return self._forward(self.model, images.to(self.model.device, self.model.dtype)).float()

    def encode(self, images: Tensor, choice: int) -> Tensor:
        with torch.inference_mode():
            return _latent(self.model.encode(images.to(self.model.device, self.model.dtype))).float()

    def positions(self, choice: int, side: int) -> int:
        return (side // choice) ** 2

    def _forward(self, model: Any, x: Tensor) -> Tensor:
        return model.decode(_latent(model.encode(x))).sample

    @cached_property
    def _fingerprint(self) -> str:
        settings = {name: value for name, value in self.model.config.items() if not name.startswith("_")}
        return fingerprint(settings, self.model.state_dict())

    def _ratio(self) -> int:
        config = self.model.config
        widths = config.get("encoder_block_out_channels") or config["block_out_channels"]
        return 2 ** (len(widths) - 1)

    def _flops(self, choice: int, side: int) -> int:
        model = copy.deepcopy(self.model).to("meta")
        return count_flops(lambda x: self._forward(model, x), side)

    def record(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": str(self.source),
            "class": self.kind,
            "fingerprint": self._fingerprint,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "latents": "mode of the posterior" if self.kind == "AutoencoderKL" else "deterministic",
        }


class OneDimensionalTokenizer:
    """FlexTok or TiTok, whose packages and weights their authors publish; images of 256 px.

    Raises:
        UserError: the package or the weights are missing.
    """

    is_spatial = False

    def __init__(self, name: str, source: Path, kind: str, device: str) -> None:
        from cat_fast.models.device import find_device

        self.name, self.source, self.kind, self.device = name, source, kind, find_device(device)
        if not source.is_dir():
            raise UserError(f"{kind}:{source}: no such folder; expected {_WEIGHTS[kind]}")
        load = _load_flextok if kind == "flextok" else _load_titok
        try:
            self.model: Any = load(source).eval().to(self.device)
        except ImportError as error:
            raise UserError(f"{kind}: the package {_PACKAGES[kind]} is missing ({error})") from error
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{kind}:{source}: cannot be loaded ({one_line(error)[:200]})") from error
        full = 256 if kind == "flextok" else int(getattr(self.model, "num_latent_tokens", 32))
        powers = tuple(2**power for power in range(full.bit_length()))
        self.choices: tuple[int, ...] = powers if kind == "flextok" else (full,)

    def reconstruct(self, images: Tensor, choice: int) -> Tensor:
        x = images.to(self.device)
        with torch.inference_mode():
            if self.kind == "flextok":
                tokens = [token[:, :choice] for token in self.model.tokenize(x)]
                return self.model.detokenize(
                    tokens, timesteps=20, guidance_scale=7.5, perform_norm_guidance=True, verbose=False
                ).float()
            indices = self.model.encode((x + 1) / 2)[1]["min_encoding_indices"]
            return self.model.decode_tokens(indices).float() * 2 - 1

    def encode(self, images: Tensor, choice: int) -> Tensor:
        raise UserError(f"{self.name}: a one-dimensional tokenizer has no latents to classify")

    def positions(self, choice: int, side: int) -> int:
        return choice

    def flops(self, choice: int, side: int) -> int | None:
        return None

    def record(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": str(self.source),
            "class": self.kind,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "latents": f"{max(self.choices)} discrete tokens",
        }


_PACKAGES = {
    "flextok": "flextok (apple/ml-flextok)",
    "titok": "modeling.titok (bytedance/1d-tokenizer, on PYTHONPATH)",
}
_WEIGHTS = {
    "flextok": "the folder of EPFL-VILAB/flextok_d18_d28_in1k or a sibling",
    "titok": "the folder of yucornetto/tokenizer_titok_l32_imagenet or a sibling",
}


def open_tokenizer(spec: str, device: str = "auto", name: str = "") -> ImageTokenizer:
    """Open a tokenizer from its folder, or `flextok:FOLDER` and `titok:FOLDER`.

    Args:
        name: name of its columns; by default derived from the folder.

    Raises:
        UserError: missing or unusable weights, or a missing package.
    """
    kind, separator, rest = spec.partition(":")
    if separator and kind in _PACKAGES:
        return OneDimensionalTokenizer(name or kind, Path(rest), kind, device)
    path = Path(spec)
    label = name or (path.parent.name if path.name in ("model", "vae") else path.stem) or "tokenizer"
    if _class_of(path) in ("AutoencoderKL", "AutoencoderDC"):
        return DiffusersTokenizer(label, path, device)
    return NestedTokenizer(label, path, device)


def count_flops(function: Any, side: int) -> int:
    """Return the operations of a function of images on the meta device, for one image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops()


def _latent(encoded: Any) -> Tensor:
    """Return the mode of a posterior, or the latent of a deterministic encoder."""
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent


def _class_of(path: Path) -> str | None:
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None


def _load_flextok(source: Path) -> nn.Module:
    from flextok.flextok_wrapper import FlexTokFromHub

    return cast(nn.Module, FlexTokFromHub.from_pretrained(str(source)))


def _load_titok(source: Path) -> nn.Module:
    from modeling.titok import TiTok

    return cast(nn.Module, TiTok.from_pretrained(str(source)))
