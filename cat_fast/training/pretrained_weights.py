"""Pretrained weights of a run: the files that a configuration needs, their locations and their downloads.

Ranks never download: nodes often have no network, and 64 ranks would fetch one file 64 times.
`cat-fast fetch CONFIG` downloads each file once, before the launch.
"""

import hashlib
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

from cat_fast.data.files import atomic_write
from cat_fast.errors import UserError
from cat_fast.generator.text_models import ENCODER_HINT, fetch_text_model, find_text_model, is_hub_name
from cat_fast.training.config.settings import GeneratorRun, RunConfig, TokenizerRun

_CHUNK = 2**20
_TORCHVISION = "https://download.pytorch.org/models"
_MOCO = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints"
_TIMEOUT = 60.0


@dataclass(frozen=True, kw_only=True)
class Source:
    """URL of a published file, and the first digits of its hash as given by its publisher."""

    url: str
    algorithm: str
    digest: str


PUBLISHED = {
    # torchvision names its files after the first digits of their SHA-256.
    "vgg16-397923af.pth": Source(
        url=f"{_TORCHVISION}/vgg16-397923af.pth", algorithm="sha256", digest="397923af"
    ),
    "alexnet-owt-7be5be79.pth": Source(
        url=f"{_TORCHVISION}/alexnet-owt-7be5be79.pth", algorithm="sha256", digest="7be5be79"
    ),
    "squeezenet1_1-b8a52dc0.pth": Source(
        url=f"{_TORCHVISION}/squeezenet1_1-b8a52dc0.pth", algorithm="sha256", digest="b8a52dc0"
    ),
    # MoCo's page lists the first digits of MD5.
    "moco_v2_800ep_pretrain.pth.tar": Source(
        url=f"{_MOCO}/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar", algorithm="md5", digest="a04e12f8"
    ),
    "moco_v2_200ep_pretrain.pth.tar": Source(
        url=f"{_MOCO}/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar", algorithm="md5", digest="59fd9945"
    ),
}
"""Sources by file name: a configuration may put the files into any folder."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A local file or folder of pretrained weights that a run reads."""

    key: str
    """Configuration key that requires it."""
    path: Path
    by_hand: str
    """Instructions to provide it without a download, or to train without it."""

    @property
    def source(self) -> Source | None:
        return PUBLISHED.get(self.path.name)

    @property
    def is_available(self) -> bool:
        return self.path.exists()


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A text encoder that a run reads from the cache of the Hugging Face hub."""

    key: str
    name: str

    @property
    def path(self) -> Path | str:
        """Folder in the cache, or the model's name while it is missing or incomplete."""
        return find_text_model(self.name) or self.name

    @property
    def is_available(self) -> bool:
        return find_text_model(self.name) is not None

    def download(self) -> None:
        """Download the model into the cache.

        Raises:
            UserError: it cannot be downloaded.
        """
        fetch_text_model(self.name)


def required_weights(config: RunConfig) -> list[Weights | HubModel]:
    """Return the pretrained weights that `config` needs, present or missing, in the order of its keys."""
    if isinstance(config, GeneratorRun):
        return [_text_encoder(config.text_encoder)] if config.text_encoder else []
    if not isinstance(config, TokenizerRun):
        return []
    needed: list[Weights | HubModel] = []
    loss = config.loss
    trunk = loss.perceptual.removeprefix("lpips_")
    if loss.perceptual_weight and trunk != loss.perceptual:
        needed.append(_trunk(trunk))
    if loss.features_weight:
        needed.append(
            Weights(
                key="loss.features_weights",
                path=Path(loss.features_weights),
                by_hand=f"put a checkpoint of {loss.features_trunk} there, or set loss.features_weight=0",
            )
        )
    if config.discriminator.pretrained:
        needed.append(
            Weights(
                key="discriminator.pretrained",
                path=Path(config.discriminator.pretrained),
                by_hand=(
                    "put a StyleGAN2-ADA network pickle with the discriminator at your resolution there "
                    "(NVIDIA publishes several), or train it from scratch: 'discriminator.pretrained=\"\"'"
                ),
            )
        )
    return needed


def _trunk(name: str) -> Weights:
    from cat_fast.tokenizer.perceptual import TRUNKS, trunk_path

    return Weights(
        key="loss.perceptual",
        path=trunk_path(name),
        by_hand=f"put torchvision's {TRUNKS[name]} there, or set loss.perceptual=st_lpips_alex",
    )


def _text_encoder(name: str) -> Weights | HubModel:
    key = "text_encoder"
    if Path(name).is_dir() or not is_hub_name(name):
        return Weights(key=key, path=Path(name), by_hand=ENCODER_HINT)
    return HubModel(key=key, name=name)


def require_weights(config: RunConfig, command: str) -> None:
    """Check that all pretrained weights are on this machine, before a rank joins the process group.

    Args:
        command: command that downloads them, for the message.

    Raises:
        UserError: a file is missing.
    """
    missing = [weights for weights in required_weights(config) if not weights.is_available]
    if missing:
        files = "; ".join(f"{weights.key}: {weights.path}" for weights in missing)
        raise UserError(f"weights are missing: {files}. Ranks do not download: run `{command}` first")


def download(
    weights: Weights,
    mirror: str = "",
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Download a published file under a temporary name, check its hash, then rename it to its path.

    Args:
        mirror: URL of a folder that holds the file under the same name, instead of the publisher's.
        on_bytes: called with the bytes so far and the total (0 if unknown).

    Raises:
        UserError: the network failed, the download is incomplete, its hash differs from the publisher's, or
            the path is not writable.
    """
    source = weights.source
    assert source is not None
    url = f"{mirror.rstrip('/')}/{weights.path.name}" if mirror else source.url
    digest = hashlib.new(source.algorithm)
    with atomic_write(weights.path) as part:
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, part.open("wb") as file:
                total, done = int(answer.headers.get("Content-Length") or 0), 0
                while chunk := answer.read(_CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    on_bytes(done, total)
        except (URLError, ConnectionError, TimeoutError, HTTPException) as error:
            raise UserError(f"{url}: cannot be downloaded ({error}); {weights.by_hand}") from error
        if total and done != total:
            raise UserError(f"{url}: expected {total} bytes, got {done}; try again")
        if not digest.hexdigest().startswith(source.digest):
            raise UserError(
                f"{url}: expected a file whose {source.algorithm} starts with {source.digest}, got "
                f"{digest.hexdigest()[:8]}: the download was discarded"
            )
