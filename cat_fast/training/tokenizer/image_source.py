"""The images of a run: the source that its configuration names, its place in checkpoints, its figures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cat_fast.complexity.image_ratios import PHOTOGRAPHS, load_index, policy_of, ratios_by_jpeg, score_records
from cat_fast.complexity.ratio import RatioThresholds
from cat_fast.complexity.ratio_policy import ratio_of_file
from cat_fast.data.image_batch import ImageBatch
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.sampling.ratio_sampler import make_plan
from cat_fast.data.streams.decoding import CropSettings
from cat_fast.data.streams.formats.base import Rating, ShardSet
from cat_fast.data.streams.formats.hugging_face import HubShards
from cat_fast.data.streams.formats.image_files import FolderShards, IndexShards, RecordShards
from cat_fast.data.streams.formats.problems import Problems
from cat_fast.data.streams.formats.remote import Remote
from cat_fast.data.streams.formats.tar import TarShards, list_shards
from cat_fast.data.streams.held_out import HeldOut, TrainingShards
from cat_fast.data.streams.plan import SHARDS_COUNTED, Mix, counted
from cat_fast.data.streams.source import StreamSource
from cat_fast.errors import UserError
from cat_fast.training.config.settings import ImageDataConfig, TokenizerRun
from cat_fast.training.runtime.collective_errors import on_each, on_main, raise_together
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.tokenizer.measure_cost import costs_of


def make_source(config: TokenizerRun, ranks: Ranks) -> StreamSource:
    """Collective.

    Raises:
        UserError: no such images, or nothing tells their ratios.
    """
    data, sampler, problems = config.data, config.sampler, Problems()
    shards = _in_memory(config, ranks) if data.held else on_each(lambda: _streamed(config, problems), ranks)
    same = ranks.broadcast(shards.fingerprint) == shards.fingerprint
    other = UserError("other images than rank 0: all ranks must see the same files")
    raise_together(None if same else other, ranks)
    rating = _rating(data)
    mix = _mix(config, shards, rating, ranks)
    costs = costs_of(config, ranks)
    return StreamSource(
        shards,
        None if sampler.pool == "all" else rating,
        lambda shares: make_plan(sampler, shares, data.batch_size, ranks.world_size, config.seed, costs),
        mix,
        CropSettings(data.image_size, data.min_crop, data.colour_jitter, data.max_side if data.held else 0),
        data.stream,
        ranks.rank,
        ranks.world_size,
        config.seed,
        problems,
        cache_bytes=data.cache_megabytes << 20 if data.held else 0,
    )


def save_source(state: Mapping[str, Any], folder: Path, ranks: Ranks) -> None:
    """Write the position of this rank's source, its `state_dict`."""
    (folder / f"images_{ranks.rank:05d}.json").write_text(json.dumps(state))


def load_source(source: StreamSource, folder: Path) -> None:
    """Every rank reads the positions of all that saved."""
    source.load_state_dict([json.loads(p.read_text()) for p in sorted(folder.glob("images_*.json"))])


def loader_amounts(batches: Sequence[ImageBatch], world_size: int) -> dict[str, float]:
    """Return this rank's part of a step's loader metrics, which are sums over ranks.

    They are the mean of the seconds that ranks waited for their images, the number of samples skipped so
    far, and the images per second that the loaders could make: a step should need fewer.
    """
    return {
        "data_seconds": sum(batch.data_seconds for batch in batches) / world_size,
        "loader_images_per_second": sum(batch.images_per_second for batch in batches) / len(batches),
        "skipped_samples": batches[-1].skipped,
    }


def _in_memory(config: TokenizerRun, ranks: Ranks) -> RecordShards:
    """Collective: the records to train on, with the ratios that `_rating` reads."""
    data, sampler = config.data, config.sampler
    records = on_each(lambda: _records(config), ranks)
    rated = sampler.pool == "own_ratio" or not sampler.shares
    if rated and data.ratios_from == "jpeg":
        return RecordShards(records, on_main(lambda: ratios_by_jpeg(records), ranks))
    return RecordShards(records)


def _records(config: TokenizerRun) -> list[ImageRecord]:
    """Return the records of the index, other than those held out."""
    index, held_out = config.data.index, held_out_of(config)
    records = load_index(index)
    if not records:
        raise UserError(f"data.index: {index} holds no images")
    kept = [record for record in records if held_out is None or record.key not in held_out]
    if not kept:
        raise UserError(f"data.held_out_share: all images of {index} are held out; lower it")
    return kept


def _streamed(config: TokenizerRun, problems: Problems) -> ShardSet:
    """Return the shards to train on, other than their held-out images."""
    shards, held_out = open_shards(config.data, problems), held_out_of(config)
    return shards if held_out is None else TrainingShards(shards, held_out)


def _mix(config: TokenizerRun, shards: ShardSet, rating: Rating, ranks: Ranks) -> Mix:
    """Collective: the shares that are set, else the data's own."""
    said, held = config.sampler.shares, config.data.held
    everyone = config.sampler.pool == "all"
    if said and (everyone or not held):
        return Mix(said)
    if everyone and not held:
        raise UserError("sampler.shares: with pool: all they have to be said, such as sampler.shares={16: 1}")
    most = len(shards.names) if held else SHARDS_COUNTED
    own = on_main(lambda: counted(shards, rating, most), ranks)
    if missing := sorted(f for f, share in said.items() if share and f not in own.shares):
        raise UserError(
            f"sampler.shares: ratio {missing[0]} has a share but no image; lower it or use sampler.pool=all"
        )
    return Mix(said) if said else own


def held_out_of(config: TokenizerRun) -> HeldOut | None:
    """The images of the run's own data that are kept out of training; None if all are trained on."""
    share = config.data.share_held_out
    return HeldOut(share, config.seed) if share else None


def open_shards(data: ImageDataConfig, problems: Problems) -> ShardSet:
    """Return the images that a configuration names, other than those held in memory.

    Raises:
        UserError: they are not there.
    """
    if data.shards:
        remote = Remote(data.stream, problems)
        return TarShards(list_shards(data.shards, remote), remote, problems, data.image)
    if data.folder:
        return FolderShards(data.folder)
    if data.dataset:
        source = data.dataset, data.dataset_config, data.dataset_split
        return HubShards(*source, data.stream, problems, data.image)
    if data.index == PHOTOGRAPHS:
        raise UserError("data.in_memory: the photographs that ship are few, and are held in memory")
    return IndexShards(data.index, problems, score_records)


def _rating(data: ImageDataConfig) -> Rating:
    # Records in memory have had their ratios by JPEG size counted.
    counted_before = data.held and data.ratios_from == "jpeg"
    policy = policy_of("index" if counted_before else data.ratios_from, RatioThresholds(*data.thresholds))
    judged = data.ratios_from == "jpeg" or data.stream.unscored == "jpeg"
    return Rating(policy.rate, ratio_of_file if judged else None)
