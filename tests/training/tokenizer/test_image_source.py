"""A run's pictures: every kind of source that a configuration can name, and its place in checkpoints."""

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

from cat_fast.complexity.image_ratios import index_photographs, ratios_of
from cat_fast.complexity.ratio import RatioThresholds
from cat_fast.complexity.ratio_policy import ratio_of_file
from cat_fast.config import fill, read_yaml
from cat_fast.data.images.crops import CropDataset, load_shrunk
from cat_fast.data.images.index import ImageRecord, write_index
from cat_fast.data.photographs import photographs
from cat_fast.data.sampling.ratio_sampler import RatioSampler
from cat_fast.data.shard_writer import IndexLines, write_shards
from cat_fast.data.streams.formats.base import UnreadableShard
from cat_fast.data.streams.formats.tar import TarShards
from cat_fast.data.streams.plan import Mix
from cat_fast.errors import UserError
from cat_fast.training.config.settings import TokenizerRun
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.seeding import step_rng
from cat_fast.training.tokenizer import image_source
from cat_fast.training.tokenizer.image_source import load_source, loader_amounts, make_source, save_source
from tests.data.streams.sets import picture
from tests.training.thread_ranks import on_thread_ranks

ROOT = Path(__file__).parents[3]
SMALL = ["data.image_size=32", "data.batch_size=2", "data.stream.workers=0", "data.stream.shuffle_pictures=4"]


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


def draw(source, steps=range(12)):
    found = []
    for step in steps:
        batch = source.batch(step)
        found.append((batch.ratio, tuple(batch.keys), batch.on(torch.device("cpu")).images))
    return found


def same(first, second) -> bool:
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(first, second, strict=True))


def test_pictures_in_memory_are_those_that_sampler_and_step_seed(index):
    run = config(f"data.index={index}", "data.colour_jitter=0.3")
    records = index_photographs(photographs("held_out"))
    paths = [str(record.path) for record in records]
    sampler = RatioSampler([record.ratio for record in records], 2, 2, run.seed, run.sampler)
    shrunk = [load_shrunk(path, 512) for path in paths]
    crops = CropDataset(shrunk, 32, 0.25, [not record.has_text for record in records], 0.3)
    _, source = on_thread_ranks(2, lambda ranks: make_source(run, ranks))
    for step in range(4):
        ratio, indices = sampler.plan()[1][:2]
        batch = source.batch(step)
        assert batch.ratio == ratio
        assert [Path(key).name for key in batch.keys] == [Path(paths[i]).name for i in indices]
        assert torch.equal(
            batch.on(torch.device("cpu")).images, crops.batch(indices, step_rng(run.seed, step, 1))
        )


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
def test_a_source_goes_on_from_what_its_ranks_saved(kind, index, shards, tmp_path):
    run = config(*SOURCES[kind](index, shards))
    sources = on_thread_ranks(2, lambda ranks: make_source(run, ranks))
    snapshots = []
    for rank, source in enumerate(sources):
        draw(source, range(5))
        snapshots.append((source.snapshot(), source.state_dict()))
        save_source(source.state_dict(), tmp_path, Ranks(rank, 2))
    resumed = on_thread_ranks(2, lambda ranks: make_source(run, ranks))
    for source, straight in zip(resumed, sources, strict=True):
        load_source(source, tmp_path)
        assert same(draw(source, range(5, 12)), draw(straight, range(5, 12)))
        source.close()
        straight.close()
    for snapshot, state in snapshots:  # of then, though the sources have moved on
        assert snapshot() == state


@pytest.mark.parametrize("kind", ["index", "shards"])
def test_a_stream_draws_the_same_mix_as_memory(kind, index, shards):
    run = config(*SOURCES[kind](index, shards))
    drawn = Counter(ratio for ratio, *_ in draw(make_source(run, Ranks()), range(40)))
    in_memory = make_source(config(f"data.index={index}"), Ranks())
    assert Counter(ratio for ratio, *_ in draw(in_memory, range(40))) == drawn


def test_scores_choose_ratios_by_thresholds(index, shards):
    records = index_photographs(photographs("held_out"))
    for thresholds in ((2, 8), (5, 6)):
        run = config(
            *SOURCES["shards"](index, shards),
            *("data.ratios_from=score", f"data.thresholds=[{thresholds[0]},{thresholds[1]}]"),
            "data.batch_size=1",
        )
        expected = {r.key: RatioThresholds(*thresholds).ratio(r.score) for r in records}
        for ratio, keys, _ in draw(make_source(run, Ranks()), range(30)):
            assert expected[keys[0].split(": ")[1]] == ratio


def test_sizes_as_jpeg_choose_ratios_where_asked_or_where_nothing_else_does(index, shards, tmp_path):
    records = index_photographs(photographs("held_out"))
    judged = dict(
        zip([r.key for r in records], ratios_of(records, "jpeg", RatioThresholds(4, 7)), strict=True)
    )
    assert [ratio_of_file(Path(r.path).read_bytes()) for r in records] == list(judged.values())
    there = [f for f in (8, 16, 32) if f in judged.values()]
    shares = f"sampler.shares={{{', '.join(f'{f}: 1' for f in there)}}}"
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in shards.glob("*.jsonl"):
        (bare / path.name).write_text('{"key": "none of them"}\n')
    for path in shards.glob("*.tar"):
        (bare / path.name).write_bytes(_without_json(path))
    for overrides in (
        [f"data.shards={shards}", "data.ratios_from=jpeg"],
        [f"data.shards={bare}", "data.stream.unscored=jpeg"],
    ):
        run = config(*overrides, shares, "data.batch_size=1")
        seen = {
            keys[0].split(": ")[1]: ratio for ratio, keys, _ in draw(make_source(run, Ranks()), range(40))
        }
        assert seen == {key: judged[key] for key in seen}
        assert len(seen) > 4


def test_a_picture_in_memory_that_no_ratio_was_chosen_for_is_named(index, tmp_path):
    first, *others = index.read_text().splitlines()
    fields = json.loads(first) | {"ratio": None}
    bad = tmp_path / "index.jsonl"
    bad.write_text("\n".join([*others, json.dumps(fields)]) + "\n")
    with pytest.raises(UserError, match=f"{fields['key']}: the index names no ratio"):
        make_source(config(f"data.index={bad}"), Ranks())


@pytest.fixture
def small_set(tmp_path):
    """Writes an index of nine pictures, three a ratio, of which some are broken."""

    def write(name: str, broken: Iterable[int] = (), changes: dict | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for n in range(9):
            (folder / f"{n}.png").write_bytes(b"no picture" if n in broken else picture(n))
        flags = {"has_text": False, "has_faces": False}
        fields = {"caption": "", "score": 5, **flags, **(changes or {})}
        records = [
            ImageRecord(**{"key": f"k{n}", "path": f"{n}.png", "ratio": (8, 16, 32)[n % 3], **fields})
            for n in range(9)
        ]
        write_index(folder / "index.jsonl", records)
        return folder / "index.jsonl"

    return write


def test_a_broken_picture_in_memory_is_left_out_on_all_ranks_and_told_once(small_set, caplog):
    indices = [small_set("zero", broken=[4]), small_set("one", broken=[4, 8])]

    def draw_all(ranks: Ranks) -> list:
        source = make_source(config(f"data.index={indices[ranks.rank]}"), ranks)
        return [source.batch(step) for step in range(20)]

    first, second = on_thread_ranks(2, draw_all)
    drawn = {Path(key).stem for batch in first + second for key in batch.keys}
    assert drawn == set("0123567")
    assert [first[-1].skipped, second[-1].skipped] == [2, 0]
    assert caplog.text.count("k4 is skipped: ") == caplog.text.count("k8 is skipped: ") == 1


def test_a_ratio_whose_pictures_in_memory_are_all_broken_ends_the_run(small_set):
    bad = small_set("bad", broken=[1, 4, 7])
    with pytest.raises(UserError, match="none of its pictures at 16x can be read"):
        make_source(config(f"data.index={bad}"), Ranks())
    source = make_source(config(f"data.index={bad}", "sampler.shares={8: 1, 32: 1}"), Ranks())
    assert source.ratios == [8, 32]
    with pytest.raises(UserError, match="no picture"):
        make_source(config(f"data.index={small_set('worse', broken=range(9))}", "sampler.pool=all"), Ranks())


def test_a_checkpoint_of_other_pictures_in_memory_is_refused(small_set):
    index = small_set("first")
    state = make_source(config(f"data.index={index}"), Ranks()).state_dict()
    make_source(config(f"data.index={small_set('moved')}"), Ranks()).load_state_dict([state])
    for other in (small_set("fewer", broken=[3]), small_set("others", changes={"ratio": 8})):
        source = make_source(config(f"data.index={other}"), Ranks())
        with pytest.raises(UserError, match=r"the checkpoint is of 9 other pictures than these [89]"):
            source.load_state_dict([state])


def _without_json(path: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old.getmembers():
            if not member.name.endswith(".json"):
                new.addfile(member, old.extractfile(member))
    return out.getvalue()


def test_shares_have_to_be_said_where_no_scores_lie_beside_the_pictures(index, shards):
    folder = photographs()[0].path.parent
    with pytest.raises(UserError, match=r"sampler\.shares.*no scores lie beside"):
        make_source(config(f"data.folder={folder}"), Ranks())
    with pytest.raises(UserError, match=r"sampler\.shares: with pool: all"):
        make_source(config(f"data.shards={shards}", "sampler.pool=all"), Ranks())


def test_ranks_that_see_other_files_are_refused_together(shards, tmp_path):
    elsewhere = tmp_path / "shards"
    shutil.copytree(shards, elsewhere)
    next(elsewhere.glob("*.tar")).unlink()

    def refused(ranks: Ranks) -> str:
        with pytest.raises(UserError) as caught:
            make_source(config(f"data.shards={elsewhere if ranks.rank else shards}"), ranks)
        return str(caught.value)

    first, second = on_thread_ranks(2, refused)
    assert first == second
    assert "other pictures than rank 0: all ranks must see the same files (on rank 1)" in first


def test_the_mix_is_counted_once_for_all_ranks_and_kept_by_a_resumed_run(shards, tmp_path, monkeypatch):
    counts = [{8: 1, 16: 5, 32: 2}, {8: 3, 16: 1, 32: 1}, {16: 1}]
    told = iter(counts)
    monkeypatch.setattr(image_source, "counted", lambda shards, rating: Mix(next(told), counted=True))
    run = config(f"data.shards={shards}")
    sources = on_thread_ranks(2, lambda ranks: make_source(run, ranks))
    assert [source.plan.plan.shares for source in sources] == [{8: 1 / 8, 16: 5 / 8, 32: 2 / 8}] * 2
    for rank, source in enumerate(sources):
        draw(source, range(5))
        save_source(source.state_dict(), tmp_path, Ranks(rank, 2))
    for _ in counts[1:]:  # another mix, and one that lacks ratios
        resumed = on_thread_ranks(2, lambda ranks: make_source(run, ranks))
        for source, straight in zip(resumed, sources, strict=True):
            load_source(source, tmp_path)
            assert source.plan.plan.shares == straight.plan.plan.shares
            assert source.ratios == [8, 16, 32]
    assert same(draw(resumed[0], range(5, 12)), draw(sources[0], range(5, 12)))
    said = make_source(config(f"data.shards={shards}", "sampler.shares={8: 1, 16: 1, 32: 2}"), Ranks())
    load_source(said, tmp_path)
    assert said.plan.plan.shares == {8: 0.25, 16: 0.25, 32: 0.5}


def test_sidecars_that_cannot_be_read_end_all_ranks_together(index, shards, monkeypatch):
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
        (["data.index=''"], "where are the pictures"),
        (["data.shards=a.tar", "data.folder=b"], r"data\.shards and data\.folder are set"),
        (["data.shards=a.tar", "data.index=mine.jsonl"], r"data\.index names mine\.jsonl, and data\.shards"),
        (["data.stream.workers=-1"], "negative"),
        (["data.stream.shuffle_pictures=0"], "must be positive"),
        (["data.stream.unscored=keep"], "'keep' is not skip or jpeg"),
        (["data.stream.unreadable=ask"], "'ask' is not skip or stop"),
        (["data.stream.first_wait=-1"], "negative"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        config(*overrides)


def test_metrics_tell_waiting_rate_and_what_was_skipped(index, shards, tmp_path):
    bad = tmp_path / "bad.jsonl"
    records = index_photographs(photographs("held_out"))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    same_ratio = [r for r in records if r.ratio == 16]
    write_index(bad, [*same_ratio, type(records[0])(**{**vars(same_ratio[0]), "path": str(broken)})])
    source = make_source(config(f"data.index={bad}", "data.in_memory=false"), Ranks())
    batch = [source.batch(step) for step in range(len(same_ratio))][-1]
    metrics = loader_amounts([batch], 1)
    assert metrics["skipped_samples"] in (1, 2)  # an epoch, or the first of the next
    assert metrics["data_seconds"] > 0
    assert np.isfinite(metrics["loader_pictures_per_second"])
