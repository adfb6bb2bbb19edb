"""Perceptual distances with pretrained features: LPIPS, and shift-tolerant LPIPS on AlexNet.

LPIPS (Zhang et al., 2018), the paper's on VGG, is that of the `lpips` package, whose trunks are downloaded.
Shift-tolerant LPIPS (Ghildyal and Liu, ECCV 2022) ships with all its weights inside the `stlpips-pytorch`
package and is read from there, so that no download is needed; the network below is our own. They are not the
same measure: each figure carries the name of its own, `lpips_vgg` or `st_lpips_alex`.
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

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.pad(x_BCHW, (2, 2, 2, 2), mode="reflect")
        return F.conv2d(x_BCHW, self.filt, stride=2, groups=x_BCHW.shape[1])


class ShiftTolerantAlexNet(nn.Module):
    """Five feature maps of an image normalised by `STLPIPS`; (B, 3, H, W) -> list of (B, C_l, H_l, W_l)."""

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
        # The checkpoint names a layer by slice and by its place in the whole stack.
        for number, (first, last) in enumerate([(0, 3), (3, 7), (7, 11), (11, 13), (13, 15)], start=1):
            part = nn.Sequential()
            for place in range(first, last):
                part.add_module(str(place), layers[place])
            self.add_module(f"slice{number}", part)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        features = []
        for number in range(1, 6):
            x_BCHW = self.get_submodule(f"slice{number}")(x_BCHW)
            features.append(x_BCHW)
        return features


class STLPIPS(nn.Module):
    """Shift-tolerant LPIPS (AlexNet): 0 for equal images, about 0.5 and more for unrelated ones.

    The module is frozen and stays in eval mode; gradients flow to the images only.
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
        """The published weights, from the installed `stlpips-pytorch` package.

        Raises:
            UserError: the package is not installed.
        """
        spec = importlib.util.find_spec("stlpips_pytorch")
        if spec is None or spec.origin is None:
            raise UserError(
                "perceptual loss st_lpips_alex: its weights come with `pip install stlpips-pytorch`"
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

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """Distance per image, (B,); images in [-1, 1], (B, 3, H, W) with H, W >= 32.

        Only `x` receives a gradient: `y` is the target. One target, (1, 3, H, W), serves a whole batch.
        """
        distance = x_BCHW.new_zeros(x_BCHW.shape[0])
        with torch.no_grad():
            targets = self._unit_features(y_BCHW)
        for feature, target, lin in zip(self._unit_features(x_BCHW), targets, self.lins, strict=True):
            distance = distance + lin((feature - target).square()).mean((1, 2, 3))
        return distance

    def _unit_features(self, x_BCHW: Tensor) -> list[Tensor]:
        features = self.net((x_BCHW - self.shift) / self.scale)
        # The epsilon sits inside the root so that the gradient of an all-zero feature stays finite.
        return [f * (f.square().sum(1, keepdim=True) + 1e-20).rsqrt() for f in features]


class LPIPS(nn.Module):
    """LPIPS of the `lpips` package, with STLPIPS' signature: (B,) from images in [-1, 1].

    Raises:
        UserError: its trunk is neither in torch's cache nor to be downloaded, and is to be `pretrained`.
    """

    def __init__(self, trunk: str, pretrained: bool = True) -> None:
        super().__init__()
        import lpips

        try:
            with warnings.catch_warnings(action="ignore"):  # it uses arguments that torchvision gave up
                self.net = lpips.LPIPS(
                    net=trunk, verbose=False, pretrained=pretrained, pnet_rand=not pretrained
                )
        except (URLError, OSError, RuntimeError) as error:
            raise UserError(
                f"perceptual loss lpips_{trunk}: its trunk {TRUNKS[trunk]} is not in {_cache()} and cannot "
                f"be downloaded ({error}); put it there, or use {STLPIPS.name}, which needs no download"
            ) from None
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        return self.net(x_BCHW, y_BCHW).flatten(1).mean(1)


TRUNKS = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
"""The file of each trunk in torch's cache."""
PERCEPTUAL = ("auto", STLPIPS.name, *(f"lpips_{trunk}" for trunk in TRUNKS))


def untrained_distance(name: str) -> tuple[str, nn.Module]:
    """The network of the distance `name` with random weights: the same work, and no files needed."""
    name = _resolve(name)
    if name == STLPIPS.name:
        return name, STLPIPS().requires_grad_(False).eval()
    return name, LPIPS(name.removeprefix("lpips_"), pretrained=False)


def perceptual_distance(name: str) -> tuple[str, nn.Module]:
    """The distance `name` of PERCEPTUAL, and what it is called; `auto` is lpips_vgg if its trunk is at hand.

    Raises:
        UserError: weights that are neither here nor to be had.
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
    """Where torch looks for the file of a trunk of TRUNKS before it would download it."""
    return _cache() / TRUNKS[trunk]


def _cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"
