"""Perceptual distance for results: LPIPS on VGG by file with checksum, or the packaged stand-in."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cat_fast.data.files import sha256
from cat_fast.errors import UserError
from cat_fast.tokenizer.perceptual import STLPIPS, trunk_path
from cat_fast.weights.published import check_keys, check_shapes
from cat_fast.weights.state_file import read_state

LPIPS_VGG = "lpips_vgg"
_DIGEST = "397923af"


class Perceptual(NamedTuple):
    """A distance, and its record for results."""

    name: str
    """Name of its figures: `lpips_vgg`, `custom-CHECKSUM-lpips_vgg` or `st_lpips_alex`."""
    network: nn.Module
    """Distance per image, (B,), of two batches in [-1, 1], (B, 3, H, W)."""
    record: dict[str, Any]


def load_perceptual(proxy: bool, source: Path | None = None) -> Perceptual:
    """Load LPIPS, or shift-tolerant LPIPS for `proxy`; nothing is downloaded.

    Args:
        source: torchvision's VGG-16 file; None searches torch's cache.

    Raises:
        UserError: the weights are missing or of another network.
    """
    if proxy:
        return Perceptual(STLPIPS.name, STLPIPS.pretrained(), {"name": STLPIPS.name})
    path = source or trunk_path("vgg")
    if not path.is_file():
        raise UserError(
            f"LPIPS: {path} is missing: put torchvision's {trunk_path('vgg').name} there, pass --weights"
            f" vgg16=FILE, or use --features proxy for {STLPIPS.name}"
        )
    checksum = sha256(path)
    name = LPIPS_VGG if checksum.startswith(_DIGEST) else f"custom-{checksum[:8]}-{LPIPS_VGG}"
    record = {"name": name, "file": path.name, "sha256": checksum, "published_weights": name == LPIPS_VGG}
    return Perceptual(name, _LPIPS(path), record)


class _LPIPS(nn.Module):
    """`lpips.LPIPS` on VGG with the trunk of a file, and the linear layers of the package."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import lpips

        with warnings.catch_warnings(action="ignore"):  # it uses deprecated arguments of torchvision
            self.net = lpips.LPIPS(net="vgg", verbose=False, pnet_rand=True)
        trunk = self.net.net
        state = read_state(path, lambda name: name.startswith("features."))
        expected = trunk.state_dict()
        found = {
            name: state[layer] for name in expected if (layer := "features." + name.split(".", 1)[1]) in state
        }
        check_keys(str(path), missing=expected.keys() - found.keys(), unexpected=())
        check_shapes(str(path), expected, found)
        trunk.load_state_dict(found)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return self.net(x, y).flatten(1).mean(1)
