"""Features of a set of images in files, so that an interrupted evaluation resumes.

DIR/settings.json       identity of the images and the network
DIR/000000.npz          features of images 0..511, their numbers, and the images left out
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cat_fast.data.files import atomic_write
from cat_fast.data.folder_settings import claim_folder
from cat_fast.errors import UserError, first_line
from cat_fast.evaluation.features.loading import LoadedNetwork
from cat_fast.evaluation.images.sets import ImageSet

PER_FILE = 512


class Skipped(NamedTuple):
    """An image left out of all figures."""

    name: str
    why: str


class FeatureFiles:
    """The features of one network for one set of images.

    Args:
        folder: created if missing.

    Raises:
        UserError: the folder contains features of other images or another network.
    """

    def __init__(self, folder: Path, images: ImageSet, network: LoadedNetwork) -> None:
        self.folder, self.images, self.network = folder, images, network
        settings = {
            "images": images.fingerprint(),
            "count": images.count,
            "network": network.name,
            "weights": network.checksum,
            "per_file": PER_FILE,
        }
        claim_folder(folder / "settings.json", settings, "features")

    @property
    def parts(self) -> range:
        """Numbers of the files."""
        return range(-(-self.images.count // PER_FILE))

    def missing(self) -> list[int]:
        """Return the numbers of the files that have not been written."""
        return [part for part in self.parts if not self._path(part).is_file()]

    def extract(
        self,
        batch_size: int,
        device: str | torch.device,
        rank: int = 0,
        world_size: int = 1,
        on_images: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Write the missing files of one machine: those whose number it has modulo `world_size`.

        The share does not depend on the files that other machines have written meanwhile.

        Args:
            on_images: called with the number of images of each batch.
        """
        for part in self.missing():
            if part % world_size != rank:
                continue
            self._write(part, batch_size, device, on_images)

    def load(self, output: str) -> Tensor:
        """Return the features of all usable images in their order, (N, size) float32."""
        found = [*self.blocks(output)]
        return torch.cat(found) if found else torch.empty(0, self.network.network.sizes[output])

    def blocks(self, output: str) -> Iterator[Tensor]:
        """Yield the features file by file, as `load`."""
        yield from map(torch.from_numpy, self._read(output))

    def skipped(self) -> list[Skipped]:
        """Return the images left out, with reasons."""
        return [Skipped(*entry) for rows in self._read("skipped") for entry in json.loads(str(rows))]

    def _read(self, name: str) -> Iterator[np.ndarray]:
        """Yield an array of each file."""
        for part in self.parts:
            path = self._path(part)
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    found = arrays[name]
            except FileNotFoundError:
                raise UserError(f"{path} is missing: run the same command again") from None
            except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"{path} is damaged ({first_line(error)}); delete it and run again"
                ) from error
            yield found

    def _write(
        self, part: int, batch_size: int, device: str | torch.device, on_images: Callable[[int], None]
    ) -> None:
        first, last = part * PER_FILE, min((part + 1) * PER_FILE, self.images.count)
        found: dict[str, list[Tensor]] = {name: [] for name in self.network.network.sizes}
        skipped: list[Skipped] = []
        waiting: list[tuple[str, Tensor]] = []

        def flush() -> None:
            if not waiting:
                return
            outputs = self.network.network(torch.stack([pixels for _, pixels in waiting]).to(device))
            finite = torch.stack([torch.isfinite(value).all(1) for value in outputs.values()]).all(0).cpu()
            for name, value in outputs.items():
                found[name].append(value.float().cpu()[finite])
            skipped.extend(
                Skipped(name, "its features are NaN or infinite")
                for (name, _), usable in zip(waiting, finite.tolist(), strict=True)
                if not usable
            )
            waiting.clear()

        for image in self.images.read(first, last):
            if image.pixels is None:
                skipped.append(Skipped(image.name, image.error))
            else:
                waiting.append((image.name, image.pixels))
            if len(waiting) == batch_size:
                flush()
            on_images(1)
        flush()
        arrays: dict[str, Any] = {
            name: torch.cat(parts).numpy() if parts else np.empty((0, size), np.float32)
            for (name, size), parts in zip(self.network.network.sizes.items(), found.values(), strict=True)
        }
        with atomic_write(self._path(part)) as temporary, temporary.open("wb") as file:
            np.savez(file, skipped=np.array(json.dumps(skipped)), **arrays)

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:06d}.npz"
