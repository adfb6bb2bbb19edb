"""Image sources of a run: every kind that can be configured, and their state in checkpoints."""

import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from cat_fast.complexity import default_thresholds
from cat_fast.complexity.ratios.image_ratios import index_photographs, ratios_by_jpeg
from cat_fast.complexity.ratios.jpeg_thresholds import JpegThresholds
from cat_fast.complexity.ratios.mix import mean_tokens
from cat_fast.complexity.ratios.thresholds import RatioThresholds
from cat_fast.config import fill, read_yaml
from cat_fast.data.images.index import ImageRecord, write_index
from cat_fast.data.photographs import photographs
from cat_fast.data.sampling.cost_table import Cost, CostTable
from cat_fast.data.shard_writer import IndexLines, write_shards
from cat_fast.data.streams.formats.base import UnreadableShard
from cat_fast.data.streams.formats.tar import TarShards
from cat_fast.data.streams.plan import Mix
from cat_fast.data.streams.source import StreamSource
from cat_fast.errors import UserError
from cat_fast.training.config.settings import TokenizerRun
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.tokenizer import image_source
from cat_fast.training.tokenizer.image_source import (
    load_source,
    loader_amounts,
    make_source,
    ratio_rule,
    save_source,
)
from cat_fast.training.tokenizer.task import TokenizerTask
from tests.data.streams.sets import image
from tests.training.thread_ranks import on_thread_ranks

ROOT = Path(__file__).parents[3]
SMALL = ["data.image_size=32", "data.batch_size=2", "data.stream.workers=0", "data.stream.shuffle_images=4"]


def config(*overrides: str) -> TokenizerRun:
    values = read_yaml(ROOT / "configs/tokenizer/nano.yaml")
    values["sampler"] = {}
    return fill(TokenizerRun, values, [*SMALL, *overrides])


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "index.jsonl"
    write_index(path, index_photographs(photographs("held_out")))
    return path


@pytest.fixture(scope="module")
def shards(index):
    folder = index.parent / "shards"
    list(write_shards(IndexLines(index), folder, per_shard=3, seed=0))
    return folder


def draw(source, steps=12):
    found = []
    for _ in range(steps):
        batch = source.batch()
        found.append((batch.ratio, tuple(batch.keys), batch.images))
    return found


def same(first, second) -> bool:
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(first, second, strict=True))


SOURCES = {
    "memory": lambda index, shards: [f"data.index={index}"],
    "index": lambda index, shards: [f"data.index={index}", "data.in_memory=false"],
    "shards": lambda index, shards: [f"data.shards={shards}"],
    "folder": lambda index, shards: [
        f"data.folder={photographs()[0].path.parent}",
        *("sampler.pool=all", "sampler.shares={8: 1, 32: 1}"),
    ],
}


@pytest.mark.parametrize("kind", SOURCES)
def test_source_resumes_from_the_saved_states_of_all_ranks(kind, index, shards, tmp_path):
    run = config(*SOURCES[kind](index, shards))
    sources = on_thread_ranks(2, lambda ranks: make_source(run, ranks))
    snapshots = []
    for rank, source in enumerate(sources):
        draw(source, 5)
        snapshots.append((source.snapshot(), source.state_dict()))
        save_source(source.state_dict(), tmp_path, Ranks(rank, 2))
    resumed = on_thread_ranks(2, lambda ranks: make_source(run, ranks))
    for source, straight in zip(resumed, sources, strict=True):
        load_source(source, tmp_path)
        assert same(draw(source, 7), draw(straight, 7))
        source.close()
        straight.close()
    for snapshot, state in snapshots:  # not changed by later batches
        assert snapshot() == state


@pytest.mark.parametrize("mode", ["per_rank", "balanced"])
def test_the_seed_of_a_run_determines_plan_shards_and_crops(index, mode, tmp_path):
    CostTable(costs={8: Cost(0, 3), 16: Cost(0, 2), 32: Cost(0, 1)}).write(tmp_path / "costs.json")
    more = [f"sampler.mode={mode}"]
    more += [f"sampler.cost_table={tmp_path / 'costs.json'}"] if mode == "balanced" else []

    def source(seed: int) -> StreamSource:
        return make_source(config(f"data.index={index}", f"seed={seed}", *more), Ranks())

    for seed in (0, 3):
        made = source(seed)
        assert made.seed == made.assignment.seed == made.plan.plan.seed == seed
        made.load_state_dict([source(seed).state_dict()])
        assert made.seed == made.assignment.seed == made.plan.plan.seed == seed
    assert not same(draw(source(0)), draw(source(3)))


@pytest.mark.parametrize("kind", ["memory", "index", "shards"])
def test_default_shares_are_those_of_the_data(kind, index, shards):
    source = make_source(config(*SOURCES[kind](index, shards)), Ranks())
    ratios = [record.ratio for record in index_photographs(photographs("held_out"))]
    assert source.plan.plan.shares == {f: ratios.count(f) / len(ratios) for f in sorted(set(ratios))}


def test_index_yields_the_same_images_in_memory_and_from_disk(index):
    """`max_side` is large here, because only images in memory are downscaled."""
    held, read = (
        make_source(config(f"data.index={index}", "data.max_side=4096", *more), Ranks())
        for more in ([], ["data.in_memory=false"])
    )
    drawn = [draw(source) for source in (held, read)]
    names = [[[key.split(": ")[1] for key in keys] for _, keys, _ in batches] for batches in drawn]
    assert names[0] == names[1]
    assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(*drawn, strict=True))
    assert held.cache is not None
    assert len(held.cache) == len({key for _, keys, _ in drawn[0] for key in keys})


def test_cache_is_bounded_and_does_not_change_batches(index):
    sources = [
        make_source(config(f"data.index={index}", f"data.cache_megabytes={size}"), Ranks())
        for size in (4096, 2)
    ]
    assert same(*(draw(source) for source in sources))
    assert [source.cache.full for source in sources] == [False, True]
    assert 0 < sources[1].cache.size <= 2 << 20


@pytest.mark.parametrize("kind", ["memory", "shards"])
def test_scores_choose_ratios_by_thresholds(kind, index, shards):
    records = index_photographs(photographs("held_out"))
    for thresholds in ((2, 8), (5, 6)):
        run = config(
            *SOURCES[kind](index, shards),
            *("data.ratios_from=score", f"data.thresholds=[{thresholds[0]},{thresholds[1]}]"),
            "data.batch_size=1",
        )
        expected = {r.key: RatioThresholds(*thresholds).ratio(r.score) for r in records}
        for ratio, keys, _ in draw(make_source(run, Ranks()), 30):
            assert expected[keys[0].split(": ")[1]] == ratio


def rescored(index, path, every=1, **changes):
    """Copy an index, with changed fields in every `every`-th line and images by absolute paths."""
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    for line in lines:
        line["path"] = str(index.parent / line["path"])
    for line in lines[::every]:
        line.update(changes)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


OTHER = {"scorer": "other", "version": "1", "thresholds": [2, 6]}


@pytest.mark.parametrize("kind", ["memory", "index", "shards"])
def test_other_thresholds_and_mixed_scorers_are_noticed_once(kind, index, tmp_path, capsys):
    def notices(source, *overrides):
        folder = tmp_path / f"shards_{source.parent.name}_{source.stem}"
        if kind == "shards" and not folder.exists():
            list(write_shards(IndexLines(source), folder, per_shard=3, seed=0))
        run = config(*SOURCES[kind](source, folder), "data.image_size=512", *overrides)
        capsys.readouterr()
        for created in on_thread_ranks(2, lambda ranks: make_source(run, ranks)):
            created.close()
        return capsys.readouterr().out.splitlines()

    records = index_photographs(photographs("held_out"))
    scores = "data.ratios_from=score"
    assert notices(index) == []
    assert notices(index, scores) == []
    (line,) = notices(index, scores, "data.thresholds=[1,2]")
    tokens = mean_tokens(RatioThresholds(1, 2).mix(r.score for r in records))
    assert line.startswith("ratios: thresholds 1,2 instead of ")
    assert f"mean {tokens:.1f} tokens per image at 512 px" in line
    assert notices(index, scores, "data.thresholds=[1,2]", "sampler.pool=all", "sampler.shares={8: 1}") == []
    (line,) = notices(index, scores, "data.thresholds=[1,2]", "sampler.shares={16: 1, 8: 3}")
    assert f"mean {(256 + 3 * 1024) / 4:.1f} tokens" in line
    (line,) = notices(index, scores, "data.thresholds=[1,2]", "data.image_size=[48,96]")
    assert "tokens per image at 48 × 96 px" in line

    whole = rescored(index, tmp_path / "whole.jsonl", scored_by=OTHER)
    (line,) = notices(whole, scores)
    assert "instead of 2,6, the thresholds of other 1" in line
    assert notices(whole, scores, "data.thresholds=[2,6]") == []
    assert notices(whole) == []
    for mixed in (
        rescored(index, tmp_path / "mixed.jsonl", every=2, scored_by=OTHER),
        rescored(index, tmp_path / "unrecorded.jsonl", every=2, scored_by=None),
    ):
        (line,) = notices(mixed, scores)
        assert "scores of 2 scorers are mixed" in line
        assert "tokens per image at 512 px" in line
    assert "scores of 2 scorers are mixed" in notices(tmp_path / "mixed.jsonl")[0]


def test_jpeg_thresholds_of_the_run_choose_ratios(index, shards):
    records = index_photographs(photographs("held_out"))
    for kind in ("memory", "shards"):
        for pair, ratio in ((JpegThresholds(0, 0), 8), (JpegThresholds(0, 10**6), 16)):
            shares = f"sampler.shares={{{ratio}: 1}}"
            thresholds = f"data.jpeg_thresholds=[{pair.a},{pair.b}]"
            run = config(*SOURCES[kind](index, shards), "data.ratios_from=jpeg", thresholds, shares)
            assert set(ratios_by_jpeg(records, pair)) == {ratio}
            source = make_source(run, Ranks())
            assert len({key for _, keys, _ in draw(source, 4) for key in keys}) > 4
            source.close()


def test_ranks_share_the_images_whose_jpeg_size_is_computed(index, monkeypatch):
    rated = []

    def recorded(records, thresholds):
        rated.append([record.key for record in records])
        return ratios_by_jpeg(records, thresholds)

    monkeypatch.setattr(image_source, "ratios_by_jpeg", recorded)
    run = config(f"data.index={index}", "data.ratios_from=jpeg")
    alone = make_source(run, Ranks())
    (keys,) = rated
    rated.clear()
    monkeypatch.setattr(image_source, "_RATED_PER_RANK", 3)
    sources = on_thread_ranks(2, lambda ranks: make_source(run, ranks))
    assert sorted(key for part in rated for key in part) == sorted(keys)
    assert len(rated) == 2 * -(-len(keys) // 6)
    assert max(map(len, rated)) == 3
    assert {source.fingerprint for source in sources} == {alone.fingerprint}
    for source in (alone, *sources):
        source.close()


def test_ranks_with_different_numbers_of_images_fail_together(index, tmp_path):
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(index.read_text().splitlines(keepends=True)[:-1]))

    def refused(ranks: Ranks) -> str:
        given = fewer if ranks.rank else index
        run = config(f"data.index={given}", "data.held_out_share=0", "data.ratios_from=jpeg")
        with pytest.raises(UserError) as caught:
            make_source(run, ranks)
        return str(caught.value)

    first, second = on_thread_ranks(2, refused)
    assert first == second
    assert "all ranks must see the same files (on rank 1)" in first


def test_resumed_run_must_choose_ratios_by_the_same_rule(index, tmp_path):
    def task(*overrides: str) -> TokenizerTask:
        task = TokenizerTask.__new__(TokenizerTask)  # without engines: the rule is compared first
        task.config = config(f"data.index={index}", "data.held_out_share=0", *overrides)
        task.initial_weights = None
        return task

    scores, jpeg = "data.ratios_from=score", "data.ratios_from=jpeg"
    pair = default_thresholds()
    for saved, same, other in (
        ([scores], [scores, f"data.thresholds=[{pair.a},{pair.b}]"], [scores, "data.thresholds=[1,2]"]),
        ([jpeg], [jpeg, "data.thresholds=[1,2]"], [jpeg, "data.jpeg_thresholds=[1,2]"]),
        ([], ["data.thresholds=[1,2]", "data.jpeg_thresholds=[1,2]"], [scores]),
    ):
        rule = ratio_rule(task(*saved).config)
        (tmp_path / "task.json").write_text(json.dumps({"held_out": None, "ratio_rule": rule}))
        with pytest.raises(UserError, match="the ratios of the run's images were chosen by"):
            task(*other).load(tmp_path)
        with pytest.raises(AttributeError, match="trainer"):  # the next step of loading
            task(*same).load(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.thresholds=[7,4]", "data.thresholds: thresholds must"),
        ("data.thresholds=[4]", "data.thresholds: expected two scores"),
        ("data.jpeg_thresholds=[7,4]", "data.jpeg_thresholds: JPEG thresholds must be bytes"),
        ("data.jpeg_thresholds=[]", "data.jpeg_thresholds: expected two sizes"),
    ],
)
def test_invalid_thresholds_are_refused_when_the_configuration_is_read(override, message):
    with pytest.raises(UserError, match=message):
        config(override)


def test_jpeg_sizes_choose_ratios_if_configured_or_for_unscored_images(index, shards, tmp_path):
    records = index_photographs(photographs("held_out"))
    by_jpeg = dict(zip([r.key for r in records], ratios_by_jpeg(records), strict=True))
    present = [f for f in (8, 16, 32) if f in by_jpeg.values()]
    shares = f"sampler.shares={{{', '.join(f'{f}: 1' for f in present)}}}"
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in shards.glob("*.jsonl"):
        (bare / path.name).write_text('{"key": "none of them"}\n')
    for path in shards.glob("*.tar"):
        (bare / path.name).write_bytes(_without_json(path))
    for overrides in (
        [f"data.index={index}", "data.ratios_from=jpeg"],
        [f"data.shards={shards}", "data.ratios_from=jpeg"],
        [f"data.shards={bare}", "data.stream.unscored=jpeg"],
    ):
        run = config(*overrides, shares, "data.batch_size=1")
        seen = {keys[0].split(": ")[1]: ratio for ratio, keys, _ in draw(make_source(run, Ranks()), 40)}
        assert seen == {key: by_jpeg[key] for key in seen}
        assert len(seen) > 4


def test_in_memory_image_without_a_ratio_is_skipped(index, tmp_path, caplog):
    first, *others = index.read_text().splitlines()
    fields = json.loads(first) | {"ratio": None, "score": None, "caption": ""}
    unrated = tmp_path / "index.jsonl"
    unrated.write_text("\n".join([*others, json.dumps(fields)]) + "\n")
    drawn = draw(make_source(config(f"data.index={unrated}"), Ranks()), 40)
    assert not any(fields["key"] in key for _, keys, _ in drawn for key in keys)
    assert f"{fields['key']} is skipped: it has neither score nor ratio" in caplog.text


@pytest.fixture
def small_set(tmp_path):
    """Function that writes an index of nine images, three per ratio, with given ones broken."""

    def write(name: str, broken: Iterable[int] = (), changes: dict | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for n in range(9):
            (folder / f"{n}.png").write_bytes(b"no image" if n in broken else image(n))
        flags = {"has_text": False, "has_faces": False}
        fields = {"caption": "", "score": 5, **flags, **(changes or {})}
        records = [
            ImageRecord(**{"key": f"k{n}", "path": f"{n}.png", "ratio": (8, 16, 32)[n % 3], **fields})
            for n in range(9)
        ]
        write_index(folder / "index.jsonl", records)
        return folder / "index.jsonl"

    return write


def test_broken_in_memory_image_is_skipped_counted_and_logged(small_set, caplog):
    source = make_source(config(f"data.index={small_set('some', broken=[4, 8])}"), Ranks())
    batches = [source.batch() for _ in range(20)]
    drawn = {key.split(": ")[1] for batch in batches for key in batch.keys}
    assert drawn == {f"k{n}" for n in range(9)} - {"k4", "k8"}
    assert {batch.count for batch in batches} == {2}
    assert batches[-1].skipped >= 2
    assert "k4 is skipped: " in caplog.text
    assert "k8 is skipped: " in caplog.text


def test_in_memory_ratio_without_a_usable_image_ends_the_run(small_set):
    bad = small_set("bad", broken=[1, 4, 7])
    with pytest.raises(UserError, match="1000 images in a row cannot be decoded"):
        draw(make_source(config(f"data.index={bad}"), Ranks()), 20)
    source = make_source(config(f"data.index={bad}", "sampler.shares={8: 1, 32: 1}"), Ranks())
    assert source.ratios == [8, 32]
    assert {ratio for ratio, *_ in draw(source, 20)} == {8, 32}
    with pytest.raises(UserError, match="ratio 4 has a share but no image"):
        make_source(config(f"data.index={bad}", "sampler.shares={4: 1}"), Ranks())
    bad.write_text("")
    with pytest.raises(UserError, match="holds no images"):
        make_source(config(f"data.index={bad}"), Ranks())


def test_balanced_mode_draws_every_in_memory_image_equally_often(small_set, tmp_path):
    costs = tmp_path / "costs.json"
    CostTable(costs={8: Cost(0, 3), 16: Cost(0, 2), 32: Cost(0, 1)}).write(costs)
    run = config(
        f"data.index={small_set('all')}",
        *(
            "sampler.mode=balanced",
            f"sampler.cost_table={costs}",
            "sampler.max_wait=0.5",
            "data.batch_size=6",
        ),
    )
    counts = set()
    for source in on_thread_ranks(2, lambda ranks: make_source(run, ranks)):
        drawn: dict[int, Counter[str]] = {8: Counter(), 16: Counter(), 32: Counter()}
        for _ in range(30):
            batch = source.batch()
            counts.add(batch.count)
            drawn[batch.ratio].update(batch.keys)
        for images in drawn.values():
            # With two ranks, each image is drawn by one rank per epoch.
            assert len(images) == 3
            assert max(images.values()) - min(images.values()) <= 1
    assert len(counts) > 1, "batch sizes must differ in balanced mode"


def test_checkpoint_of_other_in_memory_images_is_refused(small_set):
    index = small_set("first")
    state = make_source(config(f"data.index={index}"), Ranks()).state_dict()
    make_source(config(f"data.index={small_set('moved')}"), Ranks()).load_state_dict([state])
    changed = small_set("changed", changes={"ratio": 8})
    fewer = small_set("fewer")
    fewer.write_text("".join(fewer.read_text().splitlines(keepends=True)[:-1]))
    for other in (changed, fewer):
        source = make_source(config(f"data.index={other}"), Ranks())
        with pytest.raises(UserError, match="or for other images or ratios"):
            source.load_state_dict([state])
    with pytest.raises(UserError, match="by an earlier version"):
        source.load_state_dict([{"images": {}, "sampler": {}}])


def _without_json(path: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old.getmembers():
            if not member.name.endswith(".json"):
                new.addfile(member, old.extractfile(member))
    return out.getvalue()


def test_shares_are_required_for_images_without_scores(index, shards):
    folder = photographs()[0].path.parent
    with pytest.raises(UserError, match=r"sampler\.shares.*the images have no scores"):
        make_source(config(f"data.folder={folder}"), Ranks())
    with pytest.raises(UserError, match=r"sampler\.shares: required with pool: all"):
        make_source(config(f"data.shards={shards}", "sampler.pool=all"), Ranks())


def test_ranks_with_different_files_fail_together(shards, tmp_path):
    elsewhere = tmp_path / "shards"
    shutil.copytree(shards, elsewhere)
    next(elsewhere.glob("*.tar")).unlink()

    def refused(ranks: Ranks) -> str:
        with pytest.raises(UserError) as caught:
            make_source(config(f"data.shards={elsewhere if ranks.rank else shards}"), ranks)
        return str(caught.value)

    first, second = on_thread_ranks(2, refused)
    assert first == second
    assert "the images differ from rank 0's: all ranks must see the same files (on rank 1)" in first


def test_shares_are_counted_once_for_all_ranks_and_kept_on_resume(shards, tmp_path, monkeypatch):
    counts = [{8: 1, 16: 5, 32: 2}, {8: 3, 16: 1, 32: 1}, {16: 1}]
    results = iter(counts)
    monkeypatch.setattr(image_source, "count_mix", lambda *_: Mix(next(results), counted=True))
    run = config(f"data.shards={shards}")
    sources = on_thread_ranks(2, lambda ranks: make_source(run, ranks))
    assert [source.plan.plan.shares for source in sources] == [{8: 1 / 8, 16: 5 / 8, 32: 2 / 8}] * 2
    for rank, source in enumerate(sources):
        draw(source, 5)
        save_source(source.state_dict(), tmp_path, Ranks(rank, 2))
    for _ in counts[1:]:  # other shares, and shares without some ratios
        resumed = on_thread_ranks(2, lambda ranks: make_source(run, ranks))
        for source, straight in zip(resumed, sources, strict=True):
            load_source(source, tmp_path)
            assert source.plan.plan.shares == straight.plan.plan.shares
            assert source.ratios == [8, 16, 32]
    assert same(draw(resumed[0], 7), draw(sources[0], 7))
    configured = make_source(config(f"data.shards={shards}", "sampler.shares={8: 1, 16: 1, 32: 2}"), Ranks())
    load_source(configured, tmp_path)
    assert configured.plan.plan.shares == {8: 0.25, 16: 0.25, 32: 0.5}


def test_unreadable_sidecars_end_all_ranks_together(index, shards, monkeypatch):
    def unreadable(shards, index):
        raise UnreadableShard("the line is down")

    monkeypatch.setattr(TarShards, "labels", unreadable)

    def refused(ranks: Ranks) -> str:
        with pytest.raises(UserError) as caught:
            make_source(config(f"data.shards={shards}"), ranks)
        return str(caught.value)

    first, second = on_thread_ranks(2, refused)
    assert first == second
    assert "cannot be read: the line is down" in first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.index=''"], "no source of images"),
        (["data.shards=a.tar", "data.folder=b"], r"data\.shards and data\.folder are set"),
        (["data.shards=a.tar", "data.index=mine.jsonl"], r"data\.index=mine\.jsonl and data\.shards"),
        (["data.cache_megabytes=0"], "must be positive"),
        (["data.stream.workers=-1"], "negative"),
        (["data.stream.shuffle_images=0"], "must be positive"),
        (["data.stream.unscored=keep"], "'keep' is not skip or jpeg"),
        (["data.stream.unreadable=ask"], "'ask' is not skip or stop"),
        (["data.stream.first_wait=-1"], "negative"),
    ],
)
def test_invalid_settings_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        config(*overrides)


def test_loader_metrics_have_waiting_time_rate_and_skipped_samples(index, shards, tmp_path):
    bad = tmp_path / "bad.jsonl"
    records = index_photographs(photographs("held_out"))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    same_ratio = [r for r in records if r.ratio == 16]
    write_index(bad, [*same_ratio, type(records[0])(**{**vars(same_ratio[0]), "path": str(broken)})])
    source = make_source(config(f"data.index={bad}", "data.in_memory=false"), Ranks())
    batch = [source.batch() for _ in same_ratio][-1]
    metrics = loader_amounts([batch], 1)
    assert metrics["skipped_samples"] in (1, 2)  # after one epoch, or after the first image of the next
    assert metrics["data_seconds"] > 0
    assert np.isfinite(metrics["loader_images_per_second"])
