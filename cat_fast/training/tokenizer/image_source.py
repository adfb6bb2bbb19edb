"""The image source of a run: its construction, its state in checkpoints and its metrics."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cat_fast.complexity.ratios.image_ratios import (
    PHOTOGRAPHS,
    load_index,
    ratio_policy_for,
    ratios_by_jpeg,
    score_records,
)
from cat_fast.complexity.ratios.policy import OriginTally, RatioPolicy, ratio_of_file
from cat_fast.complexity.ratios.spending import spending_notice
from cat_fast.data.image_batch import ImageBatch
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.ratio_origin import RatioOrigin, as_pair
from cat_fast.data.sampling.ratio_sampler import make_plan
from cat_fast.data.streams.decoding import CropSettings
from cat_fast.data.streams.formats.base import Rating, ShardSet
from cat_fast.data.streams.formats.hugging_face import HubShards
from cat_fast.data.streams.formats.image_files import FolderShards, IndexShards, RecordShards
from cat_fast.data.streams.formats.problems import ProblemLog
from cat_fast.data.streams.formats.remote import Remote
from cat_fast.data.streams.formats.tar import TarShards, list_shards
from cat_fast.data.streams.held_out import HeldOut, TrainingShards
from cat_fast.data.streams.plan import SHARDS_COUNTED, Mix, count_mix
from cat_fast.data.streams.source import StreamSource, contents_of
from cat_fast.errors import UserError
from cat_fast.training.config.settings import ImageDataConfig, ImageRun, TokenizerRun
from cat_fast.training.runtime.collective_errors import on_each, on_main, raise_together
from cat_fast.training.runtime.divided_work import map_over_ranks
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.tokenizer.measure_cost import load_costs

_RATED_PER_RANK = 512
"""Images whose JPEG size a rank computes before it waits for the others."""


def make_source(config: ImageRun, ranks: Ranks) -> StreamSource:
    """Collective: create the image source that a configuration describes.

    Raises:
        UserError: the images are missing or differ between ranks, or their ratios are unknown.
    """
    data, sampler, problems = config.data, config.sampler, ProblemLog()
    in_memory = data.index_in_memory
    if in_memory:
        shards: ShardSet = _make_record_shards(config, ranks)
    else:
        shards = on_each(lambda: _open_training_shards(config, problems), ranks)
    identity = shards.fingerprint, shards.extent, contents_of(shards)
    same = ranks.broadcast(identity) == identity
    different = UserError("the images differ from rank 0's: all ranks must see the same files")
    raise_together(None if same else different, ranks)
    policy = _policy(data)
    tally = OriginTally(policy)
    mix = _mix(config, shards, tally, ranks)
    if ranks.is_main and (notice := _spending_notice(config, shards, tally, mix)):
        print(notice, flush=True)
    costs = load_costs(config, ranks) if isinstance(config, TokenizerRun) else None
    return StreamSource(
        shards,
        None if sampler.pool == "all" else _rating(data, policy),
        lambda shares: make_plan(sampler, shares, data.batch_size, ranks.world_size, config.seed, costs),
        mix,
        CropSettings(data.crop_size, data.min_crop, data.colour_jitter, data.max_side if in_memory else 0),
        data.stream,
        ranks.rank,
        ranks.world_size,
        config.seed,
        problems,
        cache_bytes=data.cache_megabytes << 20 if in_memory else 0,
    )


def save_source(state: Mapping[str, Any], folder: Path, ranks: Ranks) -> None:
    """Write the state of this rank's source to a checkpoint folder."""
    (folder / f"images_{ranks.rank:05d}.json").write_text(json.dumps(state))


def load_source(source: StreamSource, folder: Path) -> None:
    """Resume a source from the states of all ranks that wrote the checkpoint."""
    source.load_state_dict([json.loads(p.read_text()) for p in sorted(folder.glob("images_*.json"))])


def loader_amounts(batches: Sequence[ImageBatch], world_size: int) -> dict[str, float]:
    """Return this rank's part of a step's loader metrics, which are summed over ranks.

    After summation, `data_seconds` is the mean time that ranks waited for images. `skipped_samples` is the
    number of samples skipped so far. `loader_images_per_second` is the rate that the loaders can sustain; it
    should exceed the rate of training.
    """
    return {
        "data_seconds": sum(batch.data_seconds for batch in batches) / world_size,
        "loader_images_per_second": sum(batch.images_per_second for batch in batches) / len(batches),
        "skipped_samples": batches[-1].skipped,
    }


def _make_record_shards(config: ImageRun, ranks: Ranks) -> RecordShards:
    """Collective: return the records to train on, with JPEG-based ratios if configured."""
    data, sampler = config.data, config.sampler
    records = on_each(lambda: _records(config), ranks)
    rated = sampler.pool == "own_ratio" or not sampler.shares
    if rated and data.ratios_from == "jpeg":
        rate = partial(ratios_by_jpeg, thresholds=data.size_thresholds)
        parts = map_over_ranks(rate, records, ranks, _RATED_PER_RANK)
        return RecordShards(records, [ratio for part in parts for ratio in part])
    return RecordShards(records)


def _records(config: ImageRun) -> list[ImageRecord]:
    """Return the records of the index that are not held out."""
    index, held_out = config.data.index, make_held_out(config)
    records = load_index(index)
    if not records:
        raise UserError(f"data.index: {index} holds no images")
    kept = [record for record in records if held_out is None or record.key not in held_out]
    if not kept:
        raise UserError(f"data.held_out_share: all images of {index} are held out; lower the share")
    return kept


def _open_training_shards(config: ImageRun, problems: ProblemLog) -> ShardSet:
    """Return the shards to train on, without their held-out images."""
    shards, held_out = open_shards(config.data, problems), make_held_out(config)
    return shards if held_out is None else TrainingShards(shards, held_out)


def _mix(config: ImageRun, shards: ShardSet, tally: OriginTally, ranks: Ranks) -> Mix:
    """Collective: return the configured shares of the ratios, or else those of the data.

    On rank 0, `tally` counts the origins of the ratios that are counted.
    """
    configured, in_memory = config.sampler.shares, config.data.index_in_memory
    all_ratios = config.sampler.pool == "all"
    if configured and (all_ratios or not in_memory):
        return Mix(configured)
    if all_ratios and not in_memory:
        raise UserError("sampler.shares: required with pool: all, for example sampler.shares={16: 1}")
    max_shards = len(shards.names) if in_memory else SHARDS_COUNTED
    own = on_main(lambda: count_mix(shards, Rating(tally.ratio_from_labels), max_shards), ranks)
    if missing := sorted(f for f, share in configured.items() if share and f not in own.shares):
        raise UserError(
            f"sampler.shares: ratio {missing[0]} has a share but no image; set the share to 0 or use "
            "sampler.pool=all"
        )
    return Mix(configured) if configured else own


def make_held_out(config: ImageRun) -> HeldOut | None:
    """Return the set of images to hold out of training; None if all are trained on."""
    share = config.data.effective_held_out_share
    return HeldOut(share, config.seed) if share else None


def open_shards(data: ImageDataConfig, problems: ProblemLog) -> ShardSet:
    """Open the configured shards, folder, dataset or index on disk.

    Raises:
        UserError: the images are missing.
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
        raise UserError("data.in_memory: the bundled photographs are always kept in memory; set it to true")
    return IndexShards(data.index, problems, score_records)


def ratio_rule(config: ImageRun) -> dict[str, Any] | None:
    """Return the rule that chooses ratios, as JSON; None if each image is used at every ratio."""
    data = config.data
    if config.sampler.pool == "all" and config.sampler.shares:
        return None
    rule: dict[str, Any] = {"data.ratios_from": data.ratios_from}
    if data.ratios_from == "score":
        rule["data.thresholds"] = data.thresholds
    if _uses_jpeg_size(data):
        rule["data.jpeg_thresholds"] = data.jpeg_thresholds
    return rule


def _uses_jpeg_size(data: ImageDataConfig) -> bool:
    return data.ratios_from == "jpeg" or data.stream.unscored == "jpeg"


def _spending_notice(config: ImageRun, shards: ShardSet, tally: OriginTally, mix: Mix) -> str | None:
    """Return the notice of `spending_notice` if scores decide the ratios of this run."""
    data = config.data
    if data.ratios_from == "jpeg" or (config.sampler.pool == "all" and config.sampler.shares):
        return None
    if not tally.origins:  # the shares are configured, and nothing was counted
        tally.count(shards)
    if not tally.origins and data.ratios_from == "score":  # the shards do not list their labels
        tally.origins[RatioOrigin(source="score", thresholds=as_pair(data.thresholds))] += 1
    return spending_notice(tally.origins, mix.shares, data.crop_size)


def _policy(data: ImageDataConfig) -> RatioPolicy:
    # `_make_record_shards` has already stored JPEG-based ratios in its records.
    already_rated = data.index_in_memory and data.ratios_from == "jpeg"
    return ratio_policy_for("index" if already_rated else data.ratios_from, data.score_thresholds)


def _rating(data: ImageDataConfig, policy: RatioPolicy) -> Rating:
    by_size = partial(ratio_of_file, thresholds=data.size_thresholds)
    return Rating(policy.ratio_from_labels, by_size if _uses_jpeg_size(data) else None)
