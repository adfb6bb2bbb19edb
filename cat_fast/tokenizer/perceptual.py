"""Perceptual distances with pretrained features: LPIPS, and shift-tolerant LPIPS on AlexNet.

LPIPS (Zhang et al., 2018; the paper uses VGG) comes from the `lpips` package, which downloads its trunks.
Shift-tolerant LPIPS (Ghildyal and Liu, ECCV 2022) needs no download: its weights are part of the
`stlpips-pytorch` package, and the network below is our own. The two measures are not comparable, so every
value is reported under its own name, `lpips_vgg` or `st_lpips_alex`.
"""

import importlib.util
import warnings
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat_fast.errors import UserError

_CHANNELS = (64, 192, 384, 256, 256)
_WEIGHTS = "weights/vST0.0/alex_shift_tolerant.pth"


class BlurPool(nn.Module):
    """Binomial 3 x 3 blur with stride 2 after reflecting two pixels on each side."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filt", torch.outer(taps, taps).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (2, 2, 2, 2), mode="reflect")
        return F.conv2d(x, self.filt, stride=2, groups=x.shape[1])


class ShiftTolerantAlexNet(nn.Module):
    """AlexNet of `STLPIPS`: normalised images (B, 3, H, W) -> five feature maps (B, C_l, H_l, W_l)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 64, 11, stride=1, padding=2),
            BlurPool(64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=1),
            BlurPool(64),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=1),
            BlurPool(192),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        ]
        # The checkpoint names a layer by its slice and its index in the complete stack.
        for number, (first, last) in enumerate([(0, 3), (3, 7), (7, 11), (11, 13), (13, 15)], start=1):
            part = nn.Sequential()
            for place in range(first, last):
                part.add_module(str(place), layers[place])
            self.add_module(f"slice{number}", part)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for number in range(1, 6):
            x = self.get_submodule(f"slice{number}")(x)
            features.append(x)
        return features


class STLPIPS(nn.Module):
    """Shift-tolerant LPIPS (AlexNet): 0 for equal images, about 0.5 or more for unrelated ones.

    The module is frozen and stays in eval mode; only images receive gradients.
    """

    name = "st_lpips_alex"
    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = ShiftTolerantAlexNet()
        self.lins = nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False) for c in _CHANNELS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    @classmethod
    def pretrained(cls) -> "STLPIPS":
        """Load the published weights from the installed `stlpips-pytorch` package.

        Raises:
            UserError: the package is not installed.
        """
        spec = importlib.util.find_spec("stlpips_pytorch")
        if spec is None or spec.origin is None:
            raise UserError(
                "perceptual loss st_lpips_alex: its weights are missing; run `pip install stlpips-pytorch`"
            )
        published = torch.load(Path(spec.origin).parent / _WEIGHTS, map_location="cpu", weights_only=True)
        model = cls()
        model.load_state_dict({ours: published[theirs] for ours, theirs in model._published_names().items()})
        return model.requires_grad_(False).eval()

    def _published_names(self) -> dict[str, str]:
        names = {}
        for name in self.state_dict():
            if name.startswith("lins."):
                names[name] = f"lin{name.split('.')[1]}.model.1.weight"
            elif name in ("shift", "scale"):
                names[name] = f"scaling_layer.{name}"
            else:
                names[name] = name
        return names

    def train(self, mode: bool = True) -> "STLPIPS":
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance per image, (B,); images in [-1, 1], (B, 3, H, W) with H, W >= 32.

        Only x receives a gradient; y is the target. A single target, (1, 3, H, W), is broadcast.
        """
        distance = x.new_zeros(x.shape[0])
        with torch.no_grad():
            targets = self._unit_features(y)
        for feature, target, lin in zip(self._unit_features(x), targets, self.lins, strict=True):
            distance = distance + lin((feature - target).square()).mean((1, 2, 3))
        return distance

    def _unit_features(self, x: Tensor) -> list[Tensor]:
        features = [f.float() for f in self.net((x - self.shift) / self.scale)]  # bf16 under autocast
        # The epsilon is inside the root so that the gradient of an all-zero feature stays finite.
        return [f * (f.square().sum(1, keepdim=True) + 1e-20).rsqrt() for f in features]


class LPIPS(nn.Module):
    """LPIPS of the `lpips` package with the signature of STLPIPS: (B,) from images in [-1, 1].

    Raises:
        UserError: the pretrained trunk is not in torch's cache and cannot be downloaded.
    """

    def __init__(self, trunk: str, pretrained: bool = True) -> None:
        super().__init__()
        import lpips

        try:
            with warnings.catch_warnings(action="ignore"):  # it uses deprecated arguments of torchvision
                self.net = lpips.LPIPS(
                    net=trunk, verbose=False, pretrained=pretrained, pnet_rand=not pretrained
                )
        except (URLError, OSError, RuntimeError) as error:
            raise UserError(
                f"perceptual loss lpips_{trunk}: the trunk {TRUNKS[trunk]} is not in {_cache()} and cannot "
                f"be downloaded ({error}); copy it there, or use {STLPIPS.name}, which needs no download"
            ) from None
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net(x, y).flatten(1).mean(1)


TRUNKS = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
"""File name of each trunk in torch's cache."""
PERCEPTUAL = ("auto", STLPIPS.name, *(f"lpips_{trunk}" for trunk in TRUNKS))


def untrained_distance(name: str) -> tuple[str, nn.Module]:
    """Return the name and the network of the distance `name` with random weights, for measurements."""
    name = _resolve(name)
    if name == STLPIPS.name:
        return name, STLPIPS().requires_grad_(False).eval()
    return name, LPIPS(name.removeprefix("lpips_"), pretrained=False)


def perceptual_distance(name: str) -> tuple[str, nn.Module]:
    """Return the name and the network of a distance in PERCEPTUAL.

    `auto` selects lpips_vgg if its trunk is in torch's cache, else st_lpips_alex.

    Raises:
        UserError: the weights are missing and cannot be downloaded.
    """
    name = _resolve(name)
    if name == STLPIPS.name:
        return name, STLPIPS.pretrained()
    return name, LPIPS(name.removeprefix("lpips_"))


def _resolve(name: str) -> str:
    if name == "auto":
        return "lpips_vgg" if trunk_path("vgg").is_file() else STLPIPS.name
    return name


def trunk_path(trunk: str) -> Path:
    """Return the path in torch's cache of the file of a trunk in TRUNKS."""
    return _cache() / TRUNKS[trunk]


def _cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"
