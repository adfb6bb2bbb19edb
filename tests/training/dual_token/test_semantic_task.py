"""Stages of the semantic branch: ranks, resume, what each stage changes, evaluation and refusals."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from cat_fast.config import fill, read_yaml
from cat_fast.data.images.io import image_to_tensor, load_image
from cat_fast.data.streams.formats.config import StreamConfig
from cat_fast.dual_token.semantic.model import SemanticModel
from cat_fast.errors import UserError
from cat_fast.training.checkpoints.initial_settings import require_same_settings
from cat_fast.training.config.dual_token import PairDataConfig
from cat_fast.training.config.runs import RUNS
from cat_fast.training.dual_token.pairs import IndexedPairs, open_pairs, spread
from cat_fast.training.runtime.ranks import Ranks
from tests.data.streams.sets import write_tar
from tests.dual_token.semantic.test_causal_qformer import SMALL
from tests.inference.tiny_encoder import WORDS, save_encoder
from tests.training.rank_processes import run_ranks

WEIGHTS = "model/diffusion_pytorch_model.safetensors"
Q_FORMER = ",".join(f"{key}: {value}" for key, value in SMALL.items() if key != "encoder_hidden_size")
SIZES = [
    "model.vision={hidden_size: 12, intermediate_size: 20, num_hidden_layers: 1, num_attention_heads: 2,"
    " image_size: 16, patch_size: 8}",
    f"model.qformer={{{Q_FORMER}}}",
    f"model.reverse={{{Q_FORMER}}}",
    "model.num_queries=4",
    "model.code_channels=3",
    "model.codebook_size=8",
    "model.decoder_layers=1",
    "model.decoder_heads=2",
    "model.projection=6",
    "num_states=5",
    "data.image_size=16",
    "data.batch_size=4",
    "schedule.warmup_steps=1",
    "schedule.kind=constant",
    "optimizer.eps=0.01",
    "codebook.revive_every_steps=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten pairs with different captions, and a text encoder."""
    folder = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    lines = []
    for number in range(10):
        pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        caption = " ".join([WORDS[4 + number % 7]] * (1 + number // 7))
        lines.append(json.dumps({"path": f"{number}.png", "caption": caption}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    save_encoder(folder / "encoder")
    return folder


def arguments(data, out, *more):
    return [
        "configs/dual_token/nano_contrastive.yaml",
        f"output_dir={out}",
        f"data.index={data / 'pairs.jsonl'}",
        f"data.held_out={data / 'pairs.jsonl'}",
        f"text_target={data / 'encoder'}",
        "evaluation.every_steps=0",
        "linear_backend=mkl",
        *SIZES,
        *more,
    ]


def train(data, out, ranks, *more):
    run_ranks("tests.training.runs:train_as_rank", ranks, *arguments(data, out, *more))
    return load_file(out / WEIGHTS)


def test_contrastive_stage_on_one_and_two_ranks_and_after_resuming(data, tmp_path):
    evaluated = ["evaluation.every_steps=3"]
    one = train(data, tmp_path / "one", 1, "schedule.total_steps=3", *evaluated)
    two = train(data, tmp_path / "two", 2, "schedule.total_steps=3")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)
    train(data, tmp_path / "parts", 1, "schedule.total_steps=1", "checkpoint.every_steps=1")
    parts = train(data, tmp_path / "parts", 1, "schedule.total_steps=3", "checkpoint.every_steps=1")
    assert all(torch.equal(parts[name], value) for name, value in one.items())
    (line,) = (tmp_path / "one" / "evaluation.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert 0 <= found["held_out/retrieval_at_1"] <= 1
    assert found["held_out/candidates"] == len({json.loads(row)["caption"] for row in
                                                (data / "pairs.jsonl").read_text().splitlines()})  # fmt: skip
    metrics = json.loads((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"loss", "accuracy", "images"} <= metrics.keys()


def test_codes_stage_starts_from_the_contrastive_model_and_keeps_it(data, tmp_path):
    first = train(data, tmp_path / "first", 1, "schedule.total_steps=1")
    codes = ["stage=codes", f"initial_weights={tmp_path / 'first/model'}", "train_vision=false"]
    whole = train(data, tmp_path / "whole", 1, *codes, "schedule.total_steps=3", "evaluation.every_steps=3")
    train(data, tmp_path / "parts", 1, *codes, "schedule.total_steps=1", "checkpoint.every_steps=1")
    parts = train(data, tmp_path / "parts", 1, *codes, "schedule.total_steps=3", "checkpoint.every_steps=1")
    kept = ("vision_model.", "causal.", "image_projection", "text_projection", "contrastive_temp")
    for name, value in first.items():
        assert torch.equal(parts[name], whole[name]), name
        if name.startswith(kept):
            assert torch.equal(whole[name], value), name
    assert not torch.equal(whole["code_decoder.project.weight"], first["code_decoder.project.weight"])
    assert not torch.equal(whole["quantizer.codebook"], first["quantizer.codebook"])
    model = SemanticModel.from_pretrained(tmp_path / "whole" / "model")
    assert model.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 4)
    found = json.loads((tmp_path / "whole" / "evaluation.jsonl").read_text())
    assert -1 <= found["held_out/embedding_cosine"] <= 1
    assert 0 < found["held_out/codes_used"] <= 1
    assert -1 <= found["held_out/state_cosine"] <= 1
    assert 0 <= found["held_out/lengths_exact"] <= 1
    assert found["held_out/state_mse"] > 0


@pytest.fixture(scope="module")
def archives(data):
    """The ten pairs in two archives, with an eleventh that has no caption."""
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    samples = [
        {"__key__": f"{i:02}", "png": (data / row["path"]).read_bytes(), "txt": row["caption"].encode()}
        for i, row in enumerate(rows)
    ]
    samples.insert(3, {"__key__": "silent", "png": samples[0]["png"]})
    write_tar(data / "shards" / "0.tar", samples[:6])
    write_tar(data / "shards" / "1.tar", samples[6:])
    return ["data.index=''", f"data.shards={data / 'shards' / '*.tar'}", "data.stream.workers=0"]


def test_streams_of_archives_resume_exactly(data, archives, tmp_path):
    whole = train(data, tmp_path / "whole", 2, *archives, "schedule.total_steps=4")
    train(data, tmp_path / "parts", 2, *archives, "schedule.total_steps=1", "checkpoint.every_steps=1")
    parts = train(
        data, tmp_path / "parts", 2, *archives, "schedule.total_steps=4", "checkpoint.every_steps=1"
    )
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "accuracy", "images", "skipped_samples", "data_seconds"} <= lines[-1].keys()
    assert lines[-1]["skipped_samples"] >= 1


def test_streamed_pairs_keep_their_captions_and_are_never_flipped(data, archives):
    config = PairDataConfig(
        shards=str(data / "shards" / "*.tar"), image_size=16, batch_size=4, min_crop=1.0,
        stream=StreamConfig(workers=0, shuffle_images=4),
    )  # fmt: skip
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    pairs = open_pairs(config, 3, Ranks())
    for step in range(5):  # two epochs
        batch = pairs.batch(step)
        for image, caption, key in zip(batch.images, batch.captions, batch.keys, strict=True):
            row = rows[int(key.rpartition(": ")[2])]
            assert caption == row["caption"]
            original = image_to_tensor(load_image(data / row["path"]))
            fits = [
                (image - F.interpolate(crop[None], (16, 16), mode="bicubic", antialias=True)[0]).abs().mean()
                for x in range(5)
                for crop in (original[:, :, x : x + 20], original[:, :, x : x + 20].flip(2))
            ]
            assert int(torch.stack(fits).argmin()) % 2 == 0  # the closest crop is not mirrored
    pairs.close()


def test_ranks_share_the_batch(data):
    config = PairDataConfig(index=str(data / "pairs.jsonl"), image_size=16, batch_size=4)
    alone = IndexedPairs(config, 3, Ranks())
    parts = [IndexedPairs(config, 3, Ranks(rank=rank, world_size=2)) for rank in range(2)]
    for step in range(5):  # two batches per epoch
        whole = alone.batch(step)
        for rank, part in enumerate(parts):
            own = part.batch(step)
            assert torch.equal(own.images, whole.images[rank::2])
            assert own.captions == whole.captions[rank::2]
    epoch = [key for step in range(2) for key in alone.batch(step).keys]
    assert len(set(epoch)) == 8


def test_an_epoch_has_one_image_per_caption_and_they_take_turns(data, tmp_path):
    captions = ["rare"] * 2 + ["common"] * 8
    lines = [{"path": str(data / f"{i}.png"), "caption": caption} for i, caption in enumerate(captions)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = PairDataConfig(index=str(tmp_path / "pairs.jsonl"), image_size=16, batch_size=2)
    pairs = IndexedPairs(config, 0, Ranks())
    batches = [pairs.batch(step) for step in range(60)]  # one per epoch
    assert all(sorted(batch.captions) == ["common", "rare"] for batch in batches)
    assert len({key for batch in batches for key in batch.keys}) == 10


def test_unreadable_images_are_replaced_by_other_captions(data, tmp_path, caplog):
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        whole = (data / row["path"]).read_bytes()
        (tmp_path / row["path"]).write_bytes(whole if number % 2 or not number else whole[:200])
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    readable = {rows[number]["path"]: rows[number]["caption"] for number in (0, 1, 3, 5, 7, 9)}
    config = PairDataConfig(index=str(tmp_path / "pairs.jsonl"), image_size=16, batch_size=2)
    alone, again = (IndexedPairs(config, 3, Ranks()) for _ in range(2))
    parts = [IndexedPairs(config, 3, Ranks(rank=rank, world_size=2)) for rank in range(2)]
    for step in range(15):  # three epochs
        batch, same = alone.batch(step), again.batch(step)
        assert batch.captions == [readable[key] for key in batch.keys]
        assert len(set(batch.captions)) == 2
        assert (same.captions, same.keys) == (batch.captions, batch.keys)
        assert torch.equal(same.images, batch.images)
        for rank, part in enumerate(parts):
            own = part.batch(step)
            assert torch.equal(own.images, batch.images[rank::2])
            assert own.keys == batch.keys[rank::2]
    assert "data.index: 2.png is skipped" in caplog.text
    assert "damaged or truncated" in caplog.text


def test_an_unreadable_image_is_replaced_by_another_of_its_caption(data, tmp_path):
    rows = [{"path": str(data / f"{i}.png"), "caption": f"caption {i}"} for i in range(2)]
    rows.append({"path": str(data / "gone.png"), "caption": "caption 1"})
    index = tmp_path / "pairs.jsonl"
    index.write_text("\n".join(map(json.dumps, rows)))
    pairs = IndexedPairs(PairDataConfig(index=str(index), image_size=16, batch_size=2), 0, Ranks())
    for step in range(30):
        assert sorted(pairs.batch(step).keys) == [row["path"] for row in rows[:2]]
    index.write_text("\n".join(map(json.dumps, [rows[0], rows[2]])))
    pairs = IndexedPairs(PairDataConfig(index=str(index), image_size=16, batch_size=2), 0, Ranks())
    with pytest.raises(UserError, match=r"data\.index: no image .*: 1, the last: .*gone\.png: no such file"):
        pairs.batch(0)


def test_a_resumed_run_needs_the_same_captions(data, tmp_path):
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        row["path"] = str(data / row["path"])

    def identity():
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return IndexedPairs(
            PairDataConfig(index=str(tmp_path / "pairs.jsonl"), batch_size=2), 0, Ranks()
        ).identity

    before = identity()
    require_same_settings(before, identity())
    rows[3]["caption"] = "another"
    with pytest.raises(UserError, match=r"captions of data\.index"):
        require_same_settings(before, identity())


def test_held_out_pairs_are_spread_over_the_index():
    first = spread(range(500), 50)[:50]
    assert first == spread(range(500), 50)[:50]
    assert len(set(first)) == 50
    assert all(any(start <= row < start + 100 for row in first) for start in range(0, 500, 100))


def test_unusable_pairs_are_refused(data, archives, tmp_path):
    def refuse(**changes):
        settings = {"index": str(data / "pairs.jsonl"), "batch_size": 4} | changes
        IndexedPairs(PairDataConfig(**settings), 0, Ranks(world_size=2))

    with pytest.raises(UserError, match="more than the 10 different captions"):
        refuse(batch_size=12)
    with pytest.raises(UserError, match="cannot be divided among 2 ranks"):
        refuse(batch_size=5)
    (tmp_path / "some.jsonl").write_text('{"path": "a.png", "caption": "a"}\n{"path": "b.png"}\n' * 4)
    with pytest.raises(UserError, match="has no caption"):
        refuse(index=str(tmp_path / "some.jsonl"))
    with pytest.raises(UserError, match=r"data\.index=.* and data\.shards are both set"):
        refuse(shards="*.tar")
    with pytest.raises(UserError, match=r"data\.image=input\.jpg: applies to data\.shards only"):
        refuse(image="input.jpg")
    with pytest.raises(UserError, match=r"set data\.index or data\.shards"):
        open_pairs(PairDataConfig(), 0, Ranks())
    with pytest.raises(UserError, match="nowhere"):
        open_pairs(PairDataConfig(shards=str(tmp_path / "nowhere" / "*.tar")), 0, Ranks())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stage=other", "stage: 'other' is not contrastive or codes"),
        ("stage=codes", "initial_weights: the stage codes starts from"),
        ("accumulation_steps=2", "in-batch negatives"),
        ("logging.grid_every_steps=1", "draws no images"),
        ("data.batch_size=1", "at least 2 pairs"),
        ("data.image_size=x", "data.image_size"),
        ("num_states=0", "num_states"),
    ],
)
def test_invalid_settings_are_refused(override, words):
    values = read_yaml("configs/dual_token/nano_contrastive.yaml")
    with pytest.raises(UserError, match=words):
        fill(RUNS["dual_semantic"], values, [override])


@pytest.mark.parametrize("name", ["contrastive", "codes", "nano_contrastive", "nano_codes"])
def test_configurations_build(name):
    values = read_yaml(f"configs/dual_token/{name}.yaml")
    run = fill(RUNS[values["task"]], values, [])
    with torch.device("meta"):
        model = SemanticModel(**run.model)
    assert model.num_queries == 32
    assert model.codebook_size >= 256
