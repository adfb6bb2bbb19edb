"""Loading of feature networks by name or path; only tensors are read, and nothing is downloaded."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cat_fast.data.files import sha256
from cat_fast.errors import UserError, one_line
from cat_fast.evaluation.features.dino import DINOv2
from cat_fast.evaluation.features.inception import InceptionV3
from cat_fast.evaluation.features.network import FeatureNetwork
from cat_fast.evaluation.features.vgg import VGG16, ShiftTolerantVGG16
from cat_fast.tokenizer.perceptual import trunk_path
from cat_fast.weights.published import check_keys, check_shapes
from cat_fast.weights.state_file import read_state

NETWORKS = ("inception", "vgg16", "dinov2", "proxy")
DINOV2 = "facebook/dinov2-large"
"""Name on the Hugging Face hub."""
_INCEPTION_DIGEST = "6726825d"
_INCEPTION_FILES = tuple(
    f"{start}-2015-12-05-{_INCEPTION_DIGEST}.pth" for start in ("pt_inception", "weights-inception")
)
"""One file under the names of pytorch-fid and torch-fidelity."""
_VGG16_DIGEST = "397923af"
_PROXY_FILE = "weights/vST0.0/vgg_shift_tolerant.pth"


@dataclass(frozen=True, kw_only=True)
class LoadedNetwork:
    """A feature network, and the record of its weights for results."""

    network: FeatureNetwork
    name: str
    """One of `NETWORKS`."""
    file: str
    checksum: str
    """SHA-256 of the weights' file."""
    is_published: bool
    """True if these are the weights of published figures."""

    @property
    def prefix(self) -> str:
        """Prefix of the names of its figures: none for published weights."""
        if self.name == "proxy":
            return "proxy-"
        return "" if self.is_published else f"custom-{self.checksum[:8]}-"

    @property
    def suffix(self) -> str:
        return f"-{self.network.name}" if self.name == "proxy" else ""

    def record(self) -> dict[str, object]:
        """Return the record for a result, as JSON."""
        return {
            "network": self.name if self.name != "proxy" else f"proxy ({self.network.name})",
            "file": Path(self.file).name,
            "sha256": self.checksum,
            "published_weights": self.is_published,
            "resize": self.network.resize,
            "features": dict(self.network.sizes),
        }


def load_network(name: str, source: Path | None = None, device: str | torch.device = "cpu") -> LoadedNetwork:
    """Load a network of `NETWORKS`.

    Args:
        source: file of its weights, or the folder of a transformers model for `dinov2`; None searches torch's
            cache and that of the Hugging Face hub. `proxy` needs none.

    Raises:
        UserError: an unknown name, or missing, damaged or mismatched weights.
    """
    if name not in NETWORKS:
        raise UserError(f"features {name!r}: expected {', '.join(NETWORKS)}")
    if name == "proxy" and source is not None:
        raise UserError("weights of proxy: its weights belong to the package stlpips-pytorch; leave them out")
    loaded = _LOADERS[name](source)
    loaded.network.to(device)
    return loaded


def _load_inception(source: Path | None) -> LoadedNetwork:
    path = source or next((path for path in map(_in_cache, _INCEPTION_FILES) if path.is_file()), None)
    if path is None:
        raise UserError(
            f"features inception: the weights are missing: put {_INCEPTION_FILES[0]} of pytorch-fid (SHA-256"
            f" {_INCEPTION_DIGEST}...) into {_in_cache('')}, or pass --weights inception=FILE; --features"
            " proxy needs no download"
        )
    return _from_file("inception", InceptionV3(), path, _INCEPTION_DIGEST)


def _load_vgg16(source: Path | None) -> LoadedNetwork:
    path = source or trunk_path("vgg")
    if not path.is_file():
        raise UserError(
            f"features vgg16: {path} is missing: put torchvision's {trunk_path('vgg').name} there, or pass"
            " --weights vgg16=FILE"
        )
    return _from_file("vgg16", VGG16(), path, _VGG16_DIGEST)


def _load_dinov2(source: Path | None) -> LoadedNetwork:
    folder = source or _dinov2_in_cache()
    if folder is None or not (folder / "config.json").is_file():
        raise UserError(
            f"features dinov2: {f'{source} has no config.json' if source else 'the weights are missing'}: put"
            f" {DINOV2} into the cache of the Hugging Face hub, or pass --weights dinov2=DIR with its"
            " config.json and model.safetensors"
        )
    weights = folder / "model.safetensors"
    try:
        network = DINOv2(folder)
        checksum = sha256(weights)
    except Exception as error:  # missing, damaged and mismatched files raise different exceptions
        raise UserError(f"{folder}: the model cannot be loaded ({one_line(error)[:200]})") from error
    return LoadedNetwork(
        network=network,
        name="dinov2",
        file=str(weights),
        checksum=checksum,
        is_published=network.is_published,
    )


def _dinov2_in_cache() -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(DINOV2, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _load_proxy(_: Path | None) -> LoadedNetwork:
    spec = importlib.util.find_spec("stlpips_pytorch")
    if spec is None or spec.origin is None:
        raise UserError("features proxy: its weights are missing; run `pip install stlpips-pytorch`")
    path = Path(spec.origin).parent / _PROXY_FILE
    network = ShiftTolerantVGG16()
    network.load_published(torch.load(path, map_location="cpu", weights_only=True))
    return LoadedNetwork(
        network=network, name="proxy", file=str(path), checksum=sha256(path), is_published=False
    )


def _from_file(name: str, network: FeatureNetwork, path: Path, digest: str) -> LoadedNetwork:
    state = read_state(path)
    expected: Mapping[str, Tensor] = network.state_dict()
    # torchvision's batch counters are missing from converted TensorFlow weights; evaluation ignores them.
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    check_keys(
        str(path),
        missing=expected.keys() - state.keys() - counters,
        unexpected=state.keys() - expected.keys(),
    )
    weights = {key: value for key, value in expected.items() if key not in counters}
    check_shapes(str(path), weights, state)
    network.load_state_dict(state, strict=False)
    checksum = sha256(path)
    return LoadedNetwork(
        network=network,
        name=name,
        file=str(path),
        checksum=checksum,
        is_published=checksum.startswith(digest),
    )


def _in_cache(name: str) -> Path:
    return trunk_path("vgg").parent / name


_LOADERS: dict[str, Callable[[Path | None], LoadedNetwork]] = {
    "inception": _load_inception,
    "vgg16": _load_vgg16,
    "dinov2": _load_dinov2,
    "proxy": _load_proxy,
}
