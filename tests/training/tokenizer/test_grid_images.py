"""Grids show held-out images of the run's data, or training images if none are held out."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cat_fast.complexity.ratios.image_ratios import index_photographs
from cat_fast.config import fill, read_yaml
from cat_fast.data.images.index import ImageRecord, write_index
from cat_fast.data.images.io import load_image
from cat_fast.data.photographs import photographs
from cat_fast.data.shard_writer import write_shards
from cat_fast.data.streams.held_out import HeldOut
from cat_fast.errors import UserError
from cat_fast.training.config.settings import TokenizerRun
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.tokenizer.grid_images import grid_images
from cat_fast.training.tokenizer.image_source import make_held_out, make_source
from cat_fast.training.tokenizer.task import TokenizerTask
from tests.training.runs import ROOT, TOKENIZER
from tests.training.thread_ranks import on_thread_ranks

COUNT = 40
NANO, *TINY = TOKENIZER


def config(*overrides: str) -> TokenizerRun:
    return fill(TokenizerRun, read_yaml(ROOT / NANO), ["output_dir=unused", *TINY, *overrides])


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[ImageRecord]:
    """Forty images, each of its own color to identify it."""
    folder = tmp_path_factory.mktemp("images")
    records = []
    for number in range(COUNT):
        path = folder / f"{number:02d}.png"
        Image.new("RGB", (48, 40), (6 * number, 0, 0)).save(path)
        records.append(
            ImageRecord(
                key=path.name, path=str(path), caption="", has_text=True, has_faces=False, score=1, ratio=16
            )
        )
    write_index(folder / "index.jsonl", records)
    list(write_shards(records, folder / "shards", per_shard=10, seed=0))
    return records


def sources(records: list[ImageRecord]) -> dict[str, list[str]]:
    """Return overrides for the same images as an index (in memory or on disk), a folder and archives."""
    folder = Path(records[0].path).parent
    one_ratio = ["sampler.pool=all", "sampler.shares={16: 1}", "data.stream.workers=0"]
    common = [*one_ratio, "data.min_crop=1", "data.colour_jitter=0"]
    return {
        "memory": [f"data.index={folder}/index.jsonl", *common],
        "index": [f"data.index={folder}/index.jsonl", "data.in_memory=false", *common],
        "folder": [f"data.folder={folder}", *common],
        "archives": [f"data.shards={folder}/shards", *common],
    }


def numbers(images) -> list[int]:
    return [round(np.asarray(image)[..., 0].mean() / 6) for image in images]


KINDS = ("memory", "index", "folder", "archives")


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_images_are_shown_and_never_trained_on(records, kind):
    run = config(*sources(records)[kind], "data.held_out_share=0.2")
    shown = grid_images(run)
    assert shown.held_out
    held_out = numbers(shown.images)
    assert len(held_out) == 4
    assert held_out == numbers(grid_images(run).images)

    def trained(ranks: Ranks) -> set[int]:
        source = make_source(run, ranks)
        try:
            batches = [source.batch().on(ranks.device) for _ in range(2 * COUNT)]
            return {n for x in batches for n in numbers(x.images.add(1).mul(127.5).permute(0, 2, 3, 1))}
        finally:
            source.close()

    (seen,) = on_thread_ranks(1, trained)
    keys = [Path(record.path).name for record in records]
    chosen = HeldOut(0.2, run.seed)
    # Sample names in archives have no file extension, so their hashes differ.
    keys = [key.replace(".", "_") for key in keys] if kind == "archives" else keys
    expected = {number for number, key in enumerate(keys) if key not in chosen}
    assert 4 <= COUNT - len(expected) <= 14
    assert seen == expected
    assert not seen & set(held_out)


@pytest.mark.parametrize("kind", KINDS)
def test_without_held_out_images_grids_show_training_images(records, kind):
    shown = grid_images(config(*sources(records)[kind], "data.held_out_share=0"))
    assert not shown.held_out
    assert len(set(numbers(shown.images))) == 4


def test_one_image_in_a_thousand_is_held_out_unless_others_are_configured(records):
    own = sources(records)["memory"]
    assert make_held_out(config(*own)) == HeldOut(0.001, seed=0)
    assert make_held_out(config(*own, "logging.grid_every_steps=0")) == HeldOut(0.001, seed=0)
    assert make_held_out(config(*own, "data.held_out=elsewhere")) is None
    assert make_held_out(config()) is None
    assert sum(key in HeldOut(0.001, 0) for key in range(100_000)) == pytest.approx(100, abs=30)


def test_dataset_too_small_for_its_share_shows_training_images(records):
    run = config(*sources(records)["memory"], "data.held_out_share=1e-9")
    assert not grid_images(run).held_out


def test_in_memory_index_without_training_images_is_refused(records):
    run = config(*sources(records)["memory"], f"data.held_out_share={1 - 1e-9}")
    with pytest.raises(UserError, match=r"all images of .*are held out"):
        make_source(run, Ranks())


def test_another_seed_holds_out_other_images(records):
    chosen = [{r.key for r in records if r.key in HeldOut(0.3, seed)} for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    smaller = {r.key for r in records if r.key in HeldOut(0.1, 0)}
    assert smaller < chosen[0]


def test_bundled_photographs_show_their_held_out_split():
    by_pixels = {load_image(p.path).tobytes(): p for p in photographs("held_out")}
    shown = [grid_images(config(f"logging.grid_columns={count}")) for count in (2, 4, 99)]
    assert all(images.held_out for images in shown)
    kinds = [[by_pixels[image.tobytes()].category for image in images.images] for images in shown]
    assert kinds[1][:2] == kinds[0]
    assert len(set(kinds[1])) == 4
    assert len(kinds[2]) == len(by_pixels)


@pytest.mark.parametrize("kind", ["folder", "index"])
def test_held_out_images_can_be_configured(records, tmp_path, kind):
    for name in ("b.png", "a.png"):
        Image.new("RGB", (8, 8), (240 if name == "a.png" else 120, 0, 0)).save(tmp_path / name)
    write_index(tmp_path / "some.jsonl", index_photographs(photographs("held_out")[:2]))
    named = tmp_path if kind == "folder" else tmp_path / "some.jsonl"
    shown = grid_images(config(*sources(records)["memory"], f"data.held_out={named}"))
    assert shown.held_out
    if kind == "folder":
        assert numbers(shown.images) == [40, 20]
    else:
        paths = [p.path for p in photographs("held_out")[:2]]
        assert [image.tobytes() for image in shown.images] == [load_image(p).tobytes() for p in paths]


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="contains no image"):
        grid_images(config(f"data.held_out={tmp_path}"))


def test_broken_images_are_skipped_and_no_readable_image_is_an_error(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"broken")
    run = config(f"data.folder={tmp_path}", "data.ratios_from=jpeg")
    with pytest.raises(UserError, match=r"set data\.held_out"):
        grid_images(run)
    Image.new("RGB", (8, 8), (240, 0, 0)).save(tmp_path / "9.png")
    assert numbers(grid_images(run).images) == [40]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.held_out_share=1"], "not within"),
        (["data.held_out_share=0.1"], "already have a held-out split"),
        (["data.folder=x", "data.held_out_share=0.1", "data.held_out=y"], "remove one"),
    ],
)
def test_conflicting_settings_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        config(*overrides)


def test_resumed_run_must_hold_out_the_same_images(records, tmp_path):
    def task(*overrides: str) -> TokenizerTask:
        task = TokenizerTask.__new__(TokenizerTask)  # without engines: held-out images are compared first
        task.config = config(*sources(records)["memory"], *overrides)
        task.initial_weights = None
        return task

    saved = {"held_out": task("data.held_out_share=0.2").held_out()}
    (tmp_path / "task.json").write_text(json.dumps(saved))
    for overrides in (["data.held_out_share=0.1"], [], ["data.held_out_share=0.2", "seed=7"]):
        with pytest.raises(UserError, match="would train on images that were held out"):
            task(*overrides).load(tmp_path)
    with pytest.raises(AttributeError, match="trainer"):  # the next step of loading
        task("data.held_out_share=0.2").load(tmp_path)
