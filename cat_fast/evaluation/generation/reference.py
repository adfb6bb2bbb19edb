"""Reference of generated images: a folder of images, or an .npz file with statistics, images or both.

The layout of .npz files is ADM's: `mu`, `sigma` of the pool features, `mu_s`, `sigma_s` of the spatial ones,
all over the complete set, and `arr_0`, about 10,000 of its images, for precision, recall and KID. Files that
we write also hold `record`, the JSON record of their images and network.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cat_fast.data.files import atomic_write
from cat_fast.errors import UserError
from cat_fast.evaluation.distances.statistics import FeatureStatistics, Gaussian
from cat_fast.evaluation.features.loading import LoadedNetwork
from cat_fast.evaluation.images import npz
from cat_fast.evaluation.images.feature_files import FeatureFiles
from cat_fast.evaluation.images.sets import Crop, FolderImages, ImageSet, NpzImages

STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
RECORD = "record"
MAX_IMAGES = 10_000
"""Number of images in a reference file that we write, as in ADM's."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Reference that was opened and checked, before any network has run."""

    path: Path
    images: ImageSet | None
    """Images for precision, recall and KID; of a folder also for the statistics."""
    statistics: Mapping[str, Gaussian]
    """Statistics stored in a file, by output of the network."""
    own_record: Mapping[str, Any] | None
    """Record of a file that we wrote."""
    dtype: str = "float64"
    """dtype of the stored statistics."""

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of its images; None if unknown."""
        if self.images is not None:
            return self.images.size
        if self.own_record is not None:
            return self.own_record["images"]["height"], self.own_record["images"]["width"]
        return None

    def record(self) -> dict[str, Any]:
        """Return its identity for results, as JSON."""
        found: dict[str, Any] = {"path": str(self.path)}
        if self.images is not None:
            found["images"] = self.images.record()
        if self.statistics:
            found["statistics"] = {
                "outputs": sorted(self.statistics),
                "dtype": self.dtype,
                "images": self.own_record["images"] if self.own_record else "unknown",
                "network": self.own_record["network"] if self.own_record else "unknown",
            }
        return found


def open_reference(path: Path, crop: Crop | None = None) -> Reference:
    """Open a reference.

    Raises:
        UserError: neither a folder of images nor an .npz file with usable arrays.
    """
    if path.is_dir():
        return Reference(path=path, images=FolderImages(path, crop), statistics={}, own_record=None)
    if path.suffix != ".npz":
        raise UserError(f"{path}: expected a reference: a folder of images or an .npz file of ADM's layout")
    if crop:
        raise UserError(
            f"--crop {crop.size}: the images behind {path} were cropped when it was made; leave --crop out"
        )
    has_images = npz.array_header(path, npz.IMAGES) is not None
    images = NpzImages(path) if has_images else None
    statistics, dtypes = {}, set()
    for output, names in STATISTICS.items():
        mean, covariance = (npz.load_array(path, name) for name in names)
        if (mean is None) != (covariance is None):
            missing = names[mean is not None]
            raise UserError(f"{path}: {missing} is missing next to {names[mean is None]}")
        if mean is not None and covariance is not None:
            dtypes.add(str(covariance.dtype))
            statistics[output] = _gaussian(path, names, mean, covariance)
    if images is None and not statistics:
        raise UserError(
            f"{path}: expected the arrays mu and sigma (statistics) or arr_0 (images), got"
            f" {', '.join(npz.keys(path)) or 'none'}"
        )
    record = npz.load_array(path, RECORD)
    return Reference(
        path=path,
        images=images,
        statistics=statistics,
        own_record=json.loads(str(record)) if record is not None else None,
        dtype=min(dtypes, default="float64"),
    )


def write_reference(path: Path, features: FeatureFiles) -> dict[str, Any]:
    """Write the statistics and 10,000 images of a set in ADM's layout; return their record.

    The images are drawn at random: the first ones of a folder would be those of its first classes.

    Raises:
        UserError: fewer than two usable images, or the file cannot be written.
    """
    skipped = features.skipped()
    record = {
        "images": features.images.record() | {"used": features.images.count - len(skipped)},
        "network": features.network.record(),
    }
    arrays: dict[str, np.ndarray] = {RECORD: np.array(json.dumps(record))}
    for output, names in STATISTICS.items():
        if output in features.network.network.sizes:
            gaussian = gaussian_of(features, output)
            arrays |= zip(names, (gaussian.mean.numpy(), gaussian.covariance.numpy()), strict=True)
    kept = [
        image.pixels.permute(1, 2, 0).numpy()
        for image in features.images.pick(draw_numbers(features.images.count, MAX_IMAGES).tolist())
        if image.pixels is not None
    ]
    with atomic_write(path) as part, part.open("wb") as file:
        np.savez(file, **arrays, arr_0=np.stack(kept))  # type: ignore[arg-type]
    return record


def draw_numbers(total: int, count: int, seed: int = 0) -> Tensor:
    """Return `count` of the numbers below `total`, drawn without replacement, ascending; all if there are no
    more."""
    if total <= count:
        return torch.arange(total)
    draw = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=draw)[:count].sort().values


def gaussian_of(features: FeatureFiles, output: str) -> Gaussian:
    """Return mean and covariance of the features in files."""
    statistics = FeatureStatistics(features.network.network.sizes[output])
    for block in features.blocks(output):
        statistics.update(block)
    return statistics.gaussian()


def stored_gaussian(reference: Reference, network: LoadedNetwork, output: str) -> Gaussian | None:
    """Return the stored statistics of an output; None if they have to be computed from images.

    Raises:
        UserError: they are of another network or layer.
    """
    gaussian = reference.statistics.get(output)
    if gaussian is None:
        return None
    size = network.network.sizes[output]
    if len(gaussian.mean) != size:
        names = " and ".join(STATISTICS[output])
        hint = (
            "; sFID's layer has 7 channels of 17 x 17, and some ports store another one"
            if output == "spatial"
            else ""
        )
        raise UserError(
            f"{reference.path}: {names} have {len(gaussian.mean)} features, {network.name} has {size}: they"
            f" are of another network or layer{hint}"
        )
    if reference.own_record is not None:
        theirs = reference.own_record["network"]
        if theirs["sha256"] != network.checksum:
            raise UserError(
                f"{reference.path}: its statistics are of {theirs['network']} with SHA-256"
                f" {theirs['sha256'][:8]}..., the weights here have {network.checksum[:8]}...; make it again"
                " with cat-fast eval reference"
            )
    elif network.name != "inception":
        raise UserError(
            f"{reference.path}: its statistics are of Inception-v3, but the features here are"
            f" {network.name}; give a folder of images, or a file of cat-fast eval reference"
        )
    return gaussian


def _gaussian(path: Path, names: tuple[str, str], mean: np.ndarray, covariance: np.ndarray) -> Gaussian:
    for name, array, ndim in zip(names, (mean, covariance), (1, 2), strict=True):
        if array.ndim != ndim or not np.issubdtype(array.dtype, np.floating):
            raise UserError(
                f"{path}: {name}: expected {ndim} dimension(s) of floating-point numbers, got shape"
                f" {array.shape} {array.dtype}"
            )
    if covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: {names[1]} has shape {covariance.shape}, expected {(len(mean),) * 2}")
    return Gaussian(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double(), None)
