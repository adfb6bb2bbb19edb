"""Source of one rank's batches: plans steps, reads shards, decodes images, keeps their order."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from cat_fast.data.image_batch import ImageBatch
from cat_fast.data.sampling.step_plan import StepPlan
from cat_fast.data.streams.buffers import Position, RatioReader
from cat_fast.data.streams.crop_tasks import CropTask, CropWorkers
from cat_fast.data.streams.decoding import Crop, CropSettings, crop_seed
from cat_fast.data.streams.formats.base import Entry, Rating, ShardSet
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.data.streams.formats.image_files import FolderShards, IndexShards
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.held_out import TrainingShards
from cat_fast.data.streams.image_cache import ImageCache
from cat_fast.data.streams.open_shards import OpenShards
from cat_fast.data.streams.plan import Mix, PlanCursor, PlannedStep
from cat_fast.data.streams.pool import TaskFailure, WorkerPool
from cat_fast.data.streams.shard_assignment import ShardAssignment
from cat_fast.errors import UserError

MAX_CONSECUTIVE_FAILURES = 1000


class StreamSource:
    """Batches of one rank in step order; `cat_fast.data.streams` lists the guarantees.

    Args:
        rating: rule that gives images their ratios; None if every image is used at every ratio.
        make_plan: returns the step plan (ratio and number of images per rank) for a mix of ratios.
        mix: shares of the ratios; a resumed run uses the checkpoint's if they were counted.
        cache_bytes: memory for decoded images, which are then cropped in the training process; images that do
            not fit are decoded by the workers each time. 0 disables the cache.
    """

    def __init__(
        self,
        shards: ShardSet,
        rating: Rating | None,
        make_plan: Callable[[Mapping[int, float]], StepPlan],
        mix: Mix,
        crop: CropSettings,
        config: StreamConfig,
        rank: int,
        world_size: int,
        seed: int,
        problems: ProblemLog,
        cache_bytes: int = 0,
    ) -> None:
        self.plan, self.crop, self.config = PlanCursor(make_plan, mix, rank), crop, config
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.problems = problems
        self.pool, self.in_process = WorkerPool(config.workers), WorkerPool(0)
        self.cache = ImageCache(cache_bytes, crop) if cache_bytes else None
        self.open_shards = OpenShards(
            shards, rating, self.pool, problems, 2 * len(self.ratios), config.unreadable == "stop"
        )
        self.fingerprint, self.extent = shards.fingerprint, shards.extent
        self.contents = contents_of(shards)
        self.shard_count = len(shards.names)
        assignment = ShardAssignment(self.shard_count, world_size, seed)
        self._start(assignment, dict.fromkeys(self.ratios, Position()), skipped=0)

    @property
    def ratios(self) -> list[int]:
        """Possible ratios of a batch, ascending; the same on all ranks."""
        return self.plan.ratios

    @property
    def largest_batches(self) -> Mapping[int, int]:
        """Largest number of images of a batch at each ratio."""
        return self.plan.plan.counts

    def batch(self) -> ImageBatch:
        """Return the next batch, its images on the CPU.

        Raises:
            UserError: there are no usable images.
        """
        start = time.perf_counter()
        self._prefetch(self.config.prefetch_steps + 1)
        planned = self._planned.popleft()
        crops: list[Crop] = []
        tasks: list[CropTask] = []
        while len(crops) < planned.share.images:
            task, crop = self._next_crop(planned.share.ratio)
            if crop is None:
                task.release()
            else:
                crops.append(crop)
                tasks.append(task)
        self._plan_state = planned.state
        self._prefetch(self.config.prefetch_steps)
        decoding = sum(crop.seconds for crop in crops)
        images = torch.from_numpy(np.stack([crop.pixels for crop in crops]))
        for task in tasks:
            task.release()
        samples = [task.sample for task in tasks]
        return ImageBatch(
            ratio=planned.share.ratio,
            images=images,
            keys=[f"{sample.shard}: {sample.key}" for sample in samples],
            captions=[sample.caption for sample in samples],
            data_seconds=time.perf_counter() - start,
            images_per_second=self._decoders * len(crops) / decoding,
            skipped=self._skipped,
        )

    @property
    def _identity(self) -> dict[str, Any]:
        """Identity of the shards as JSON, which a resumed run compares."""
        identity: dict[str, Any] = {
            "count": self.shard_count,
            "fingerprint": self.fingerprint,
            "extent": self.extent,
        }
        return identity if self.contents is None else identity | {"contents": self.contents}

    @property
    def _shuffle(self) -> list[int]:
        """Settings that determine the images of a shuffle buffer."""
        return [self.config.shuffle_images, self.config.shuffle_megabytes]

    @property
    def _decoders(self) -> int:
        return 1 if self.cache is not None else max(1, self.config.workers)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch, as JSON."""
        return self.snapshot()()

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """Return a function that builds the current `state_dict` later; cheap enough for every step."""
        assignment, plan, positions = self.assignment, self._plan_state, dict(self._positions)
        skipped = self._skipped

        def state() -> dict[str, Any]:
            unfinished = {r: p for r, p in assignment.partial_epochs.items() if p.epoch >= positions[r].epoch}
            return {
                "shards": self._identity,
                "plan": plan,
                "positions": {str(ratio): list(astuple(at)) for ratio, at in positions.items()},
                "left": replace(assignment, partial_epochs=unfinished).state_dict(),
                "shuffle": self._shuffle,
                "skipped": skipped,
            }

        return state

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Resume from the states of all ranks of a run, in rank order.

        On the same number of ranks, reading continues at the exact image; with another size of the shuffle
        buffers, at the start of each ratio's current buffer. Else see `ShardAssignment.reassign`.

        Raises:
            UserError: the states are for other shards or other ratios.
        """
        for state in states:
            self._require_same_shards(state)
        self.plan.load_state_dict(states[0]["plan"])
        before = [{int(f): Position(*at) for f, at in state["positions"].items()} for state in states]
        assignment = ShardAssignment(self.shard_count, len(states), self.seed)
        if len(states) == self.world_size:
            mine, at = states[self.rank], before[self.rank]
            if mine.get("shuffle", self._shuffle) != self._shuffle:  # the buffers have other images
                at = {ratio: replace(position, taken=0) for ratio, position in at.items()}
            self._start(assignment.with_state(mine["left"]), at, mine["skipped"])
        else:
            # Ranks that are past a partial epoch no longer store it.
            left = {ratio: fields for state in states for ratio, fields in state["left"].items()}
            reached = {f: [(at[f].epoch, at[f].shard) for at in before] for f in self.ratios}
            assignment = assignment.with_state(left).reassign(self.world_size, reached)
            skipped = sum(state["skipped"] for state in states) if self.rank == 0 else 0
            self._start(assignment, {f: Position(assignment.first_epoch(f)) for f in self.ratios}, skipped)

    def close(self) -> None:
        """Stop the worker processes and reader threads."""
        for reader in self._readers.values():
            reader.close()
        self.pool.close()

    def _start(self, assignment: ShardAssignment, at: dict[int, Position], skipped: int) -> None:
        """Start reading at given positions; discard everything prefetched before."""
        for reader in getattr(self, "_readers", {}).values():
            reader.close()
        self.assignment, self._positions, self._skipped = assignment, dict(at), skipped
        self._readers = {
            ratio: RatioReader(
                ratio,
                self.rank,
                assignment,
                self.open_shards,
                accepts=partial(_has_ratio, ratio, self.open_shards.rating is None),
                counts_unrated=ratio == self.ratios[0],
                max_images=self.config.shuffle_images,
                max_bytes=self.config.shuffle_megabytes << 20,
                position=at[ratio],
            )
            for ratio in self.ratios
        }
        self._pending: dict[int, deque[CropTask]] = {ratio: deque() for ratio in self.ratios}
        in_flight = (self.config.prefetch_steps + 2) * max(self.largest_batches.values())
        # with new memory: earlier tasks may still write to theirs
        self._workers = CropWorkers(self.pool, self.crop, in_flight)
        self._planned: deque[PlannedStep] = deque()
        self._plan_state = self.plan.state_dict()
        self._consecutive_failures = 0

    def _prefetch(self, steps: int) -> None:
        """Submit the images of the next steps to the workers, as far as they have been read."""
        while len(self._planned) < steps:
            self._planned.append(self.plan.next())
        for ratio in self.ratios:
            needed = sum(planned.share.images for planned in self._planned if planned.share.ratio == ratio)
            while len(self._pending[ratio]) < needed and self._readers[ratio].ready():
                self._pending[ratio].append(self._submit(ratio))

    def _submit(self, ratio: int) -> CropTask:
        sample = self._readers[ratio].pick()
        seed = crop_seed(self.seed, sample.epoch, ratio, sample.key)
        if self.cache is not None and self.cache.serves(sample):
            return CropTask(sample, self.in_process.submit(self.cache.crop, sample, seed))
        return self._workers.submit(sample, seed)

    def _next_crop(self, ratio: int) -> tuple[CropTask, Crop | None]:
        """Return the ratio's next task and its crop (None if decoding fails); move the position past it."""
        pending = self._pending[ratio]
        task = pending.popleft() if pending else self._submit(ratio)
        sample, crop = task.sample, task.result()
        self._positions[ratio] = sample.after
        self._skipped += sample.skipped
        if not isinstance(crop, TaskFailure):
            self._consecutive_failures = 0
            return task, crop
        self._skipped += 1
        self._consecutive_failures += 1
        self.problems.report(f"{sample.shard}: {sample.key}", crop.reason)
        if self._consecutive_failures == MAX_CONSECUTIVE_FAILURES:
            raise UserError(
                f"{MAX_CONSECUTIVE_FAILURES} images in a row cannot be decoded; the last is {sample.key} "
                f"of {sample.shard}: {crop.reason}. Check that the data set contains images"
            )
        return task, None

    def _require_same_shards(self, state: dict[str, Any]) -> None:
        if "shards" not in state:
            raise UserError(
                "the checkpoint's data position was written by an earlier version; start a new run, for "
                "example with checkpoint.resume=never"
            )
        before = state["shards"]
        # checkpoints of earlier versions record less
        if any(before.get(name, value) != value for name, value in self._identity.items()):
            raise UserError(
                f"the checkpoint is for {before['count']} other shards than these {self.shard_count}, or for "
                "other images or ratios; use the same shards in the same order, or start a new run"
            )


def _has_ratio(ratio: int, any_ratio: bool, entry: Entry) -> bool:
    return any_ratio or entry.ratio == ratio


def contents_of(shards: ShardSet) -> str | None:
    """Return a hash of the lines of an index on disk, or of the names of all files in a folder.

    None for other shards, whose fingerprint covers as much as can be compared without reading them.
    """
    inner = shards.shards if isinstance(shards, TrainingShards) else shards
    return inner.contents if isinstance(inner, IndexShards | FolderShards) else None
