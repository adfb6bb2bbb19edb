"""Batches of one rank from shards: planned, read, decoded and put in order."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

import numpy as np
import torch

from cat_fast.data.image_batch import ImageBatch
from cat_fast.data.sampling.step_plan import StepPlan
from cat_fast.data.streams.buffers import Position, RatioReader, Sample
from cat_fast.data.streams.decoding import Crop, CropSettings, crop_seed, decode_crop
from cat_fast.data.streams.formats.base import Entry, Rating, ShardSet
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.problems import Problems
from cat_fast.data.streams.image_cache import ImageCache
from cat_fast.data.streams.open_shards import OpenShards
from cat_fast.data.streams.plan import Mix, PlanCursor, Planned
from cat_fast.data.streams.pool import Broken, Task, WorkerPool
from cat_fast.data.streams.shard_assignment import Dealing
from cat_fast.errors import UserError

MOST_BROKEN_IN_A_ROW = 1000


class StreamSource:
    """Batches of one rank, in the order of the steps; see the package for what it promises.

    Args:
        rating: how images get their ratios; None if every image serves every ratio.
        plan_of: ratio and number of images of each rank, step by step, for a mix of ratios.
        mix: that mix; of a run that goes on, the checkpoint's if it was counted.
        cache_bytes: memory for decoded images, which are then cropped in the training process; images without
            room are decoded by the workers each time. 0 keeps none.
    """

    def __init__(
        self,
        shards: ShardSet,
        rating: Rating | None,
        plan_of: Callable[[Mapping[int, float]], StepPlan],
        mix: Mix,
        crop: CropSettings,
        config: StreamConfig,
        rank: int,
        world_size: int,
        seed: int,
        problems: Problems,
        cache_bytes: int = 0,
    ) -> None:
        self.plan, self.crop, self.config = PlanCursor(plan_of, mix, rank), crop, config
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.problems = problems
        self.pool, self.in_process = WorkerPool(config.workers), WorkerPool(0)
        self.cache = ImageCache(cache_bytes, crop) if cache_bytes else None
        self.open_shards = OpenShards(
            shards, rating, self.pool, problems, 2 * len(self.ratios), config.unreadable == "stop"
        )
        self.fingerprint = shards.fingerprint
        self.shard_count = len(shards.names)
        self._begin(
            Dealing(self.shard_count, world_size, seed), dict.fromkeys(self.ratios, Position()), skipped=0
        )

    @property
    def ratios(self) -> list[int]:
        """Ratios that batches can have, ascending; the same on all ranks."""
        return self.plan.ratios

    def batch(self) -> ImageBatch:
        """Return the next batch, its images on the CPU.

        Raises:
            UserError: nothing that can be used comes any more.
        """
        start = time.perf_counter()
        self._look_ahead(self.config.prefetch_steps + 1)
        planned = self._planned.popleft()
        crops: list[Crop] = []
        keys: list[str] = []
        while len(crops) < planned.share.images:
            sample, crop = self._next_crop(planned.share.ratio)
            if crop is not None:
                crops.append(crop)
                keys.append(f"{sample.shard}: {sample.key}")
        self._plan_state = planned.state
        self._look_ahead(self.config.prefetch_steps)
        decoding = sum(crop.seconds for crop in crops)
        return ImageBatch(
            ratio=planned.share.ratio,
            images=torch.from_numpy(np.stack([crop.pixels for crop in crops])),
            keys=keys,
            data_seconds=time.perf_counter() - start,
            images_per_second=self._decoders * len(crops) / decoding,
            skipped=self._skipped,
        )

    @property
    def _decoders(self) -> int:
        return 1 if self.cache is not None else max(1, self.config.workers)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch, as JSON."""
        return self.snapshot()()

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """Return a function that makes the `state_dict` of now, at any later time; cheap in every step."""
        dealing, plan, positions = self.dealing, self._plan_state, dict(self._positions)
        skipped = self._skipped

        def state() -> dict[str, Any]:
            under_way = {r: left for r, left in dealing.left.items() if left.epoch >= positions[r].epoch}
            return {
                "shards": {"count": self.shard_count, "fingerprint": self.fingerprint},
                "plan": plan,
                "positions": {str(ratio): list(astuple(at)) for ratio, at in positions.items()},
                "left": Dealing(self.shard_count, self.world_size, self.seed, under_way).state_dict(),
                "skipped": skipped,
            }

        return state

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Resume from the states that all ranks of a run saved, in their order.

        On the number of ranks that saved them, at the very image; on another, see `Dealing.resumed`.

        Raises:
            UserError: other shards than those the states speak of, or other ratios.
        """
        for state in states:
            self._require_same_shards(state)
        self.plan.load_state_dict(states[0]["plan"])
        before = [{int(f): Position(*at) for f, at in state["positions"].items()} for state in states]
        dealing = Dealing(self.shard_count, len(states), self.seed)
        if len(states) == self.world_size:
            mine = states[self.rank]
            self._begin(dealing.with_state(mine["left"]), before[self.rank], mine["skipped"])
        else:
            # Ranks that are past the epoch that was left have forgotten it.
            left = {ratio: fields for state in states for ratio, fields in state["left"].items()}
            reached = {f: [(at[f].epoch, at[f].shard) for at in before] for f in self.ratios}
            dealing = dealing.with_state(left).resumed(self.world_size, reached)
            skipped = sum(state["skipped"] for state in states) if self.rank == 0 else 0
            self._begin(dealing, {f: Position(dealing.first_epoch(f)) for f in self.ratios}, skipped)

    def close(self) -> None:
        """End processes and threads."""
        for reader in self._readers.values():
            reader.close()
        self.pool.close()

    def _begin(self, dealing: Dealing, at: dict[int, Position], skipped: int) -> None:
        """Read from given positions on; what was read ahead before is let go."""
        for reader in getattr(self, "_readers", {}).values():
            reader.close()
        self.dealing, self._positions, self._skipped = dealing, dict(at), skipped
        self._readers = {
            ratio: RatioReader(
                ratio,
                self.rank,
                dealing,
                self.open_shards,
                takes=partial(_takes, ratio, self.open_shards.rating is None),
                counts=ratio == self.ratios[0],
                most_images=self.config.shuffle_images,
                most_bytes=self.config.shuffle_megabytes << 20,
                position=at[ratio],
            )
            for ratio in self.ratios
        }
        self._under_way: dict[int, deque[tuple[Sample, Task]]] = {ratio: deque() for ratio in self.ratios}
        self._planned: deque[Planned] = deque()
        self._plan_state = self.plan.state_dict()
        self._broken_in_a_row = 0

    def _look_ahead(self, steps: int) -> None:
        """Give the workers what the next steps will need, as far as it has been read."""
        while len(self._planned) < steps:
            self._planned.append(self.plan.next())
        for ratio in self.ratios:
            needed = sum(planned.share.images for planned in self._planned if planned.share.ratio == ratio)
            while len(self._under_way[ratio]) < needed and self._readers[ratio].ready():
                self._under_way[ratio].append(self._submit(ratio))

    def _submit(self, ratio: int) -> tuple[Sample, Task]:
        sample = self._readers[ratio].pick()
        seed = crop_seed(self.seed, sample.epoch, ratio, sample.key)
        if self.cache is not None and self.cache.serves(sample):
            return sample, self.in_process.submit(self.cache.crop, sample, seed)
        return sample, self.pool.submit(decode_crop, sample.data, seed, sample.mirrored, self.crop)

    def _next_crop(self, ratio: int) -> tuple[Sample, Crop | None]:
        """The ratio's next image, decoded, or None for one that is broken. Moves the position past it."""
        under_way = self._under_way[ratio]
        sample, task = under_way.popleft() if under_way else self._submit(ratio)
        crop = task.result()
        self._positions[ratio] = sample.after
        self._skipped += sample.skipped
        if not isinstance(crop, Broken):
            self._broken_in_a_row = 0
            return sample, crop
        self._skipped += 1
        self._broken_in_a_row += 1
        self.problems.report(f"{sample.shard}: {sample.key}", crop.reason)
        if self._broken_in_a_row == MOST_BROKEN_IN_A_ROW:
            raise UserError(
                f"{MOST_BROKEN_IN_A_ROW} images in a row cannot be decoded, the last {sample.key} "
                f"of {sample.shard}: {crop.reason}; are these images?"
            )
        return sample, None

    def _require_same_shards(self, state: dict[str, Any]) -> None:
        if "shards" not in state:
            raise UserError(
                "the checkpoint's position in the data is of an earlier version: start a new run, as "
                "with checkpoint.resume=never"
            )
        shards = state["shards"]
        if shards["fingerprint"] != self.fingerprint:
            raise UserError(
                f"the checkpoint is of {shards['count']} other shards than these {self.shard_count}, or of "
                "other images or ratios: give the same ones in the same order, or start a new run"
            )


def _takes(ratio: int, every: bool, entry: Entry) -> bool:
    return every or entry.ratio == ratio
