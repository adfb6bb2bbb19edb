"""The pictures of a run: the source that its configuration names, its place in checkpoints, its figures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from cat_fast.complexity.image_ratios import PHOTOGRAPHS, load_index, policy_of, ratios_of
from cat_fast.complexity.ratio import RatioThresholds
from cat_fast.complexity.ratio_policy import ratio_of_file
from cat_fast.data.image_batch import ImageBatch, ImageSource
from cat_fast.data.images.crops import CropDataset, load_shrunk
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.memory_source import MemorySource
from cat_fast.data.sampling.ratio_sampler import RatioSampler, make_plan
from cat_fast.data.streams.decoding import CropSettings
from cat_fast.data.streams.formats.base import Rating, ShardSet
from cat_fast.data.streams.formats.hugging_face import HubShards
from cat_fast.data.streams.formats.image_files import FolderShards, IndexShards
from cat_fast.data.streams.formats.problems import Problems
from cat_fast.data.streams.formats.remote import Remote
from cat_fast.data.streams.formats.tar import TarShards, list_shards
from cat_fast.data.streams.held_out import HeldOut, TrainingShards
from cat_fast.data.streams.plan import Mix, counted
from cat_fast.data.streams.source import StreamSource
from cat_fast.errors import UserError
from cat_fast.training.config.settings import ImageDataConfig, TokenizerRun
from cat_fast.training.runtime.collective_errors import on_each, on_main, raise_together
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.seeding import step_rng
from cat_fast.training.tokenizer.measure_cost import costs_of


def make_source(config: TokenizerRun, ranks: Ranks) -> ImageSource:
    """Collective.

    Raises:
        UserError: no such pictures, or nothing tells their ratios.
    """
    data = config.data
    if data.in_memory and not data.streamed:
        return _in_memory(config, ranks)
    return _streamed(config, ranks)


def save_source(state: Mapping[str, Any], folder: Path, ranks: Ranks) -> None:
    """Write the position of this rank's source, its `state_dict`."""
    (folder / f"pictures_{ranks.rank:05d}.json").write_text(json.dumps(state))


def load_source(source: ImageSource, folder: Path) -> None:
    """Every rank reads the positions of all that saved."""
    source.load_state_dict([json.loads(p.read_text()) for p in sorted(folder.glob("pictures_*.json"))])


def loader_amounts(batches: Sequence[ImageBatch], world_size: int) -> dict[str, float]:
    """Return this rank's part of a step's loader metrics, which are sums over ranks.

    They are the mean of the seconds that ranks waited for their pictures, the number of samples skipped so
    far, and the pictures per second that the loaders could make: a step should need fewer.
    """
    return {
        "data_seconds": sum(batch.data_seconds for batch in batches) / world_size,
        "loader_pictures_per_second": sum(batch.images_per_second for batch in batches) / len(batches),
        "skipped_samples": batches[-1].skipped,
    }


def _in_memory(config: TokenizerRun, ranks: Ranks) -> MemorySource:
    data = config.data
    held_out = held_out_of(config)
    index = on_each(lambda: load_index(data.index), ranks)
    every = [record for record in index if held_out is None or record.key not in held_out]
    records, pictures = _readable(every, data.max_side, ranks)
    ratios = _ratios(every, records, config)
    costs = costs_of(config, ranks)
    sampler = RatioSampler(ratios, data.batch_size, ranks.world_size, config.seed, config.sampler, costs)
    crops = CropDataset(
        pictures,
        data.image_size,
        data.min_crop,
        mirrored=[not r.has_text for r in records],
        colour_jitter=data.colour_jitter,
    )
    return MemorySource(
        sampler,
        crops,
        [r.path for r in records],
        ranks.rank,
        lambda step: step_rng(config.seed, step, ranks.rank),
        skipped=len(every) - len(records) if ranks.is_main else 0,
    )


def _readable(
    records: Sequence[ImageRecord], max_side: int, ranks: Ranks
) -> tuple[list[ImageRecord], list[Image]]:
    """Collective: the records whose pictures every rank can read, since all plan by one list, and those
    pictures. Rank 0 tells which are left out."""
    pictures: dict[int, Image] = {}
    broken: dict[int, str] = {}
    for number, record in enumerate(records):
        try:
            pictures[number] = load_shrunk(record.path, max_side)
        except UserError as error:
            broken[number] = str(error)
    broken = {number: why for its in ranks.gather(broken) for number, why in its.items()}
    problems = Problems()
    for number in sorted(broken) if ranks.is_main else ():
        problems.report(records[number].key, broken[number])
    kept = [number for number in range(len(records)) if number not in broken]
    return [records[number] for number in kept], [pictures[number] for number in kept]


def _ratios(every: Sequence[ImageRecord], kept: Sequence[ImageRecord], config: TokenizerRun) -> list[int]:
    """Of the pictures that are kept, as long as no ratio is lost with those that are not."""
    data, sampler = config.data, config.sampler
    thresholds = RatioThresholds(*data.thresholds)
    ratios = ratios_of(kept, data.ratios_from, thresholds)
    if sampler.pool == "own_ratio" and not sampler.shares and data.ratios_from != "jpeg":
        lost = set(ratios_of(every, data.ratios_from, thresholds)) - set(ratios)
        if lost:
            raise UserError(
                f"data.index: {data.index}: none of its pictures at {min(lost)}x can be read: see the "
                "warnings above, or leave the ratio out of sampler.shares"
            )
    return ratios


def _streamed(config: TokenizerRun, ranks: Ranks) -> StreamSource:
    data, problems = config.data, Problems()
    held_out = held_out_of(config)
    shards = on_each(lambda: open_shards(data, problems), ranks)
    shards = shards if held_out is None else TrainingShards(shards, held_out)
    same = ranks.broadcast(shards.names) == shards.names
    other = UserError("other pictures than rank 0: all ranks must see the same files")
    raise_together(None if same else other, ranks)
    everyone = config.sampler.pool == "all"
    rating = _rating(data)
    if everyone and not config.sampler.shares:
        raise UserError("sampler.shares: with pool: all they have to be said, such as sampler.shares={16: 1}")
    said = config.sampler.shares
    mix = Mix(said) if said else on_main(lambda: counted(shards, rating), ranks)
    costs = costs_of(config, ranks)
    return StreamSource(
        shards,
        None if everyone else rating,
        lambda shares: make_plan(
            config.sampler, shares, data.batch_size, ranks.world_size, config.seed, costs
        ),
        mix,
        CropSettings(data.image_size, data.min_crop, data.colour_jitter),
        data.stream,
        ranks.rank,
        ranks.world_size,
        config.seed,
        problems,
    )


def held_out_of(config: TokenizerRun) -> HeldOut | None:
    """The images of the run's own data that are kept out of training; None if all are trained on."""
    share = config.data.held_out_share
    return HeldOut(share, config.seed) if share else None


def open_shards(data: ImageDataConfig, problems: Problems) -> ShardSet:
    """Return the images that a configuration names, other than those held in memory.

    Raises:
        UserError: they are not there.
    """
    if data.shards:
        remote = Remote(data.stream, problems)
        return TarShards(list_shards(data.shards, remote), remote, problems)
    if data.folder:
        return FolderShards(data.folder)
    if data.dataset:
        return HubShards(data.dataset, data.dataset_config, data.dataset_split, data.stream, problems)
    if data.index == PHOTOGRAPHS:
        raise UserError("data.in_memory: the photographs that ship are few, and are held in memory")
    return IndexShards(data.index)


def _rating(data: ImageDataConfig) -> Rating:
    policy = policy_of(data.ratios_from, RatioThresholds(*data.thresholds))
    judged = data.ratios_from == "jpeg" or data.stream.unscored == "jpeg"
    return Rating(policy.rate, ratio_of_file if judged else None)
