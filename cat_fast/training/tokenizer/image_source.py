"""The pictures of a run: the source that its configuration names, its place in checkpoints, its figures."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cat_fast.complexity.image_ratios import PHOTOGRAPHS, load_index, ratio_of_file, ratios_by_jpeg
from cat_fast.complexity.ratio import SCORES, RatioThresholds
from cat_fast.data.image_batch import ImageBatch
from cat_fast.data.images.index import ImageRecord
from cat_fast.data.sampling.ratio_sampler import make_plan
from cat_fast.data.streams.decoding import CropSettings
from cat_fast.data.streams.formats.base import Labels, Rating, ShardSet
from cat_fast.data.streams.formats.hugging_face import HubShards
from cat_fast.data.streams.formats.image_files import FolderShards, IndexShards, RecordShards
from cat_fast.data.streams.formats.problems import Problems
from cat_fast.data.streams.formats.remote import Remote
from cat_fast.data.streams.formats.tar import TarShards, list_shards
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
        UserError: no such pictures, or nothing tells their ratios.
    """
    data, sampler, problems = config.data, config.sampler, Problems()
    shards = _in_memory(config, ranks) if data.held else on_each(lambda: _shards(data, problems), ranks)
    same = ranks.broadcast(shards.fingerprint) == shards.fingerprint
    other = UserError("other pictures than rank 0: all ranks must see the same files")
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


def save_source(source: StreamSource, folder: Path, ranks: Ranks) -> None:
    """Every rank writes its own position."""
    (folder / f"pictures_{ranks.rank:05d}.json").write_text(json.dumps(source.state_dict()))


def load_source(source: StreamSource, folder: Path) -> None:
    """Every rank reads the positions of all that saved."""
    source.load_state_dict([json.loads(p.read_text()) for p in sorted(folder.glob("pictures_*.json"))])


def loader_metrics(batches: Sequence[ImageBatch], ranks: Ranks) -> dict[str, float]:
    """Collective, of the batches of a step: seconds that ranks waited for their pictures, samples skipped so
    far, and pictures a second that the loaders could make, beside which the step's own rate should be small.
    """
    totals = torch.tensor(
        [
            sum(batch.data_seconds for batch in batches),
            sum(batch.images_per_second for batch in batches) / len(batches),
            batches[-1].skipped,
        ],
        dtype=torch.float64,
        device=ranks.device,
    )
    seconds, rate, skipped = ranks.sum(totals).tolist()
    return {
        "data_seconds": seconds / ranks.world_size,
        "loader_pictures_per_second": rate,
        "skipped_samples": skipped,
    }


def _in_memory(config: TokenizerRun, ranks: Ranks) -> RecordShards:
    """Collective: the records of an index, with the ratios that `_rating` reads."""
    data, sampler = config.data, config.sampler
    records = on_each(lambda: _load_index(data.index), ranks)
    rated = sampler.pool == "own_ratio" or not sampler.shares
    if rated and data.ratios_from == "jpeg":
        return RecordShards(records, on_main(lambda: ratios_by_jpeg(records), ranks))
    return RecordShards(records)


def _load_index(name: str) -> list[ImageRecord]:
    records = load_index(name)
    if not records:
        raise UserError(f"data.index: {name} holds no pictures")
    return records


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
            f"sampler.shares: ratio {missing[0]} has a share but no picture; lower it or use sampler.pool=all"
        )
    return Mix(said) if said else own


def _shards(data: ImageDataConfig, problems: Problems) -> ShardSet:
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
    thresholds = RatioThresholds(*data.thresholds)

    def by_score(labels: Labels) -> int | None:
        score = labels.score
        return thresholds.ratio(score) if score is not None and score in SCORES else None

    by_labels: dict[str, Callable[[Labels], int | None]] = {
        "index": lambda labels: labels.ratio,
        "score": by_score,
        # Records that are held have had their ratios counted.
        "jpeg": lambda labels: labels.ratio if data.held else None,
    }
    judged = data.ratios_from == "jpeg" or data.stream.unscored == "jpeg"
    return Rating(by_labels[data.ratios_from], ratio_of_file if judged else None)
