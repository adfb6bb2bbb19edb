"""Small data sets of distinguishable images, as archives and in memory."""

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import TarWriter

from cat_fast.data.sampling.step_plan import PerRankPlan
from cat_fast.data.streams.buffers import Position, RatioReader
from cat_fast.data.streams.decoding import CropSettings
from cat_fast.data.streams.formats.base import Entry, Labels, Rating, ShardSet, fingerprint_of
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.formats.remote import Remote
from cat_fast.data.streams.formats.sidecar import write_sidecar
from cat_fast.data.streams.formats.tar import TarShards, list_shards
from cat_fast.data.streams.open_shards import OpenShards
from cat_fast.data.streams.plan import Mix
from cat_fast.data.streams.pool import WorkerPool
from cat_fast.data.streams.shard_assignment import ShardAssignment
from cat_fast.data.streams.source import StreamSource

BY_INDEX = Rating(lambda labels: labels.ratio)
CROP = CropSettings(8, 0.5)
START = Position()
SHARES = {8: 1.0, 16: 2.0, 32: 1.0}


def image(number: int, kind: str = "PNG", size: tuple[int, int] = (20, 16)) -> bytes:
    """Return an encoded image of noise that is unique to `number`."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, samples: Sequence[dict]) -> Path:
    """Write an archive of webdataset samples: `{"__key__": key, "png": bytes, "json": bytes}`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as archive:
        for sample in samples:
            archive.write(sample)
    return path


def write_shards(folder: Path, ratios: Sequence[Sequence[int]], broken: Sequence[str] = ()) -> Path:
    """Write a shard of images `SHARD-NUMBER` for each list of ratios; keys in `broken` are invalid."""
    for shard, its_ratios in enumerate(ratios):
        keys = [f"{shard}-{number}" for number in range(len(its_ratios))]
        samples = [
            {"__key__": key, "png": b"not an image" if key in broken else image(100 * shard + number)}
            for number, key in enumerate(keys)
        ]
        path = write_tar(folder / f"shard-{shard:06d}.tar", samples)
        write_sidecar(path, [{"key": k, "ratio": f} for k, f in zip(keys, its_ratios, strict=True)])
    return folder


def tar_set(folder: Path | str, config: StreamConfig | None = None) -> TarShards:
    problems = ProblemLog()
    remote = Remote(config or StreamConfig(), problems)
    return TarShards(list_shards(str(folder), remote), remote, problems)


def make_source(
    shards: ShardSet,
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 2,
    seed: int = 0,
    shares: dict[int, float] = SHARES,
    rating: Rating | None = BY_INDEX,
    crop: CropSettings = CROP,
    cache_bytes: int = 0,
    **stream,
) -> StreamSource:
    settings = {"workers": 0, "shuffle_images": 3, "first_wait": 0.0} | stream
    return StreamSource(
        shards,
        rating,
        lambda mix: PerRankPlan(mix, batch_size, world_size, seed),
        Mix(shares),
        crop,
        StreamConfig(**settings),
        rank,
        world_size,
        seed,
        ProblemLog(),
        cache_bytes,
    )


def batches(source: StreamSource, steps: range) -> list[tuple]:
    """Return ratio, keys, pixels and number of skipped samples of each batch."""
    found = []
    for _ in steps:
        batch = source.batch()
        found.append((batch.ratio, tuple(batch.keys), batch.images.numpy().tobytes(), batch.skipped))
    return found


def state_of(source: StreamSource) -> dict:
    """Return the state after a round trip through JSON, as in a checkpoint."""
    return json.loads(json.dumps(source.state_dict()))


class MemoryShards:
    """`ShardSet` of given ratios that counts the reads of each image."""

    def __init__(self, ratios: Sequence[Sequence[int]]) -> None:
        self.ratios = ratios
        self.names = [f"shard {n}" for n in range(len(ratios))]
        self.fingerprint, self.extent = fingerprint_of(self.names), len(self.names)
        self.opened: Counter[int] = Counter()
        self.read: Counter[str] = Counter()

    def open(self, index: int) -> "MemoryShard":
        self.opened[index] += 1
        return MemoryShard(self, index)

    def labels(self, index: int) -> list[Labels]:
        return [Labels(ratio=ratio) for ratio in self.ratios[index]]


class MemoryShard:
    def __init__(self, parent: MemoryShards, index: int) -> None:
        self.parent, self.index, self.name = parent, index, parent.names[index]

    def entries(self, first: int) -> Iterator[Entry]:
        for number, ratio in list(enumerate(self.parent.ratios[self.index]))[first:]:
            key = f"{self.index}-{number}"

            def read(key: str = key) -> bytes:
                self.parent.read[key] += 1
                return b"x" * 100

            yield Entry(number, key, Labels(ratio=ratio), read)


def make_reader(
    shards: ShardSet,
    ratio: int,
    *,
    rank: int = 0,
    assignment: ShardAssignment | None = None,
    position: Position = START,
    max_images: int = 3,
    max_bytes: int = 1 << 30,
    open_shards: OpenShards | None = None,
) -> RatioReader:
    return RatioReader(
        ratio,
        rank,
        assignment or ShardAssignment(len(shards.names), 1, 0),
        open_shards or OpenShards(shards, BY_INDEX, WorkerPool(0), ProblemLog(), 4, False),
        accepts=lambda entry: entry.ratio == ratio,
        counts_unrated=ratio == 8,
        max_images=max_images,
        max_bytes=max_bytes,
        position=position,
    )


def keys_of_epochs(reader: RatioReader, epochs: int) -> list[list[str]]:
    """Return the keys of each epoch's images, in order."""
    found: list[list[str]] = [[] for _ in range(epochs)]
    while True:
        pick = reader.pick()
        if pick.epoch >= epochs:
            return found
        found[pick.epoch].append(pick.key)


def as_list(position: Position) -> list[int]:
    return list(asdict(position).values())
