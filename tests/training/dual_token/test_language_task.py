"""Runs that train the language model: ranks, resume, evaluation, and generation from its model."""

import json
import math
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cat_fast.config import fill, read_yaml
from cat_fast.dual_token.semantic.text_target import open_text_target
from cat_fast.dual_token.tokenizer import DualTokenizer
from cat_fast.errors import UserError
from cat_fast.training.config.dual_token import LanguageDataConfig
from cat_fast.training.config.runs import RUNS
from cat_fast.training.dual_token import encoded_pairs
from cat_fast.training.dual_token.encoded_pairs import EncodedPair, encode_pairs, read_encoded
from cat_fast.training.dual_token.language_evaluation import _other_captions
from cat_fast.training.dual_token.language_task import LanguageTask
from cat_fast.training.runtime.ranks import Ranks
from tests.dual_token.conftest import tiny_guide
from tests.inference.tiny_encoder import WORDS, save_encoder
from tests.kernels.onednn import needs_onednn
from tests.training.rank_processes import run_ranks
from tests.training.thread_ranks import on_thread_ranks

WEIGHTS = "model/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight pairs, a tokenizer of guides and a text encoder."""
    folder = tmp_path_factory.mktemp("language")
    random = np.random.default_rng(0)
    lines = []
    for number in range(8):
        pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"path": f"{number}.png", "caption": WORDS[4 + number % 7]}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    save_encoder(folder / "encoder")
    DualTokenizer(tiny_guide(), max_side=4).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def tokenizer(data):
    return DualTokenizer.from_pretrained(data / "tokenizer", "cpu")


@pytest.fixture
def rows(data):
    """Rows of the index, with absolute paths."""
    found = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()]
    return [row | {"path": str(data / row["path"])} for row in found]


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def encode(tokenizer, path, index, ranks=None):
    """Encode an index to a file; return the file's content."""
    config = LanguageDataConfig(grids=[2, 3])
    encode_pairs(path, str(index), "data.index", tokenizer, config, 0, ranks or Ranks())
    return path.read_bytes()


def train(data, out, ranks, *more):
    run_ranks(
        "tests.training.runs:train_as_rank", ranks,
        "configs/dual_token/nano_language.yaml",
        f"output_dir={out}",
        f"data.index={data / 'pairs.jsonl'}",
        f"data.held_out={data / 'pairs.jsonl'}",
        f"data.tokenizer={data / 'tokenizer'}",
        f"data.text_encoder={data / 'encoder'}",
        "data.grids=[2,3]",
        "data.batch_size=4",
        "data.max_states=4",
        "model.hidden_size=16",
        "model.intermediate_size=24",
        "model.num_layers=1",
        "model.num_heads=2",
        "schedule.warmup_steps=1",
        "schedule.kind=constant",
        "optimizer.eps=0.01",
        "evaluation.every_steps=0",
        "linear_backend=onednn",
        *more,
    )  # fmt: skip
    return load_file(out / WEIGHTS)


@needs_onednn
def test_a_run_on_one_and_two_ranks_and_after_resuming(data, tmp_path):
    one = train(data, tmp_path / "one", 1, "schedule.total_steps=3", "evaluation.every_steps=3")
    two = train(data, tmp_path / "two", 2, "schedule.total_steps=3")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5, msg=name)
    train(data, tmp_path / "parts", 1, "schedule.total_steps=1", "checkpoint.every_steps=1")
    parts = train(data, tmp_path / "parts", 1, "schedule.total_steps=3", "checkpoint.every_steps=1")
    assert all(torch.equal(parts[name], value) for name, value in one.items())
    found = json.loads((tmp_path / "one" / "evaluation.jsonl").read_text())
    assert 0 < found["held_out/bits"] < 3 * math.log2(64)
    assert found["held_out/bits_of_bigrams"] <= found["held_out/bits_of_unigrams"]
    assert "held_out/bits_with_other_captions_difference_upper" in found


@pytest.mark.parametrize("earlier", [False, True])
def test_sequences_are_those_of_the_same_captions_wherever_their_index_is(tokenizer, rows, tmp_path, earlier):
    path = tmp_path / "sequences.jsonl"
    content = encode(tokenizer, path, write_rows(tmp_path / "pairs.jsonl", rows))
    if earlier:  # a file of an earlier version, which recorded the path of the index
        header, _, sequences = content.partition(b"\n")
        settings = {key: value for key, value in json.loads(header).items() if "SHA-256" not in key}
        content = json.dumps(settings | {"index": "pairs.jsonl"}).encode() + b"\n" + sequences
        path.write_bytes(content)
    assert encode(tokenizer, path, write_rows(tmp_path / "moved.jsonl", rows)) == content
    rows[3]["caption"] = "another"
    with pytest.raises(UserError, match=r"sequences\.jsonl: SHA-256 of the keys and captions of data\.index"):
        encode(tokenizer, path, write_rows(tmp_path / "pairs.jsonl", rows))
    assert path.read_bytes() == content


def test_ranks_share_the_encoding_and_resume_a_killed_one(tokenizer, rows, tmp_path, monkeypatch):
    index, path = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "cut.jsonl"
    straight = encode(tokenizer, tmp_path / "straight.jsonl", index)
    monkeypatch.setattr(encoded_pairs, "_PER_RANK", 2)
    real, threads = DualTokenizer.encode, []

    def counted(self, image, grid):
        threads.append(threading.get_ident())
        if len(threads) == 6:  # in the third part
            raise KeyboardInterrupt
        return real(self, image, grid)

    monkeypatch.setattr(DualTokenizer, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        encode(tokenizer, path, index)
    assert not path.exists()
    with (tmp_path / ".cut.jsonl.rows").open("a") as file:
        file.write('{"key": ')  # cut while it was written
    started = len(threads)
    assert on_thread_ranks(2, lambda ranks: encode(tokenizer, path, index, ranks)) == [straight] * 2
    assert sorted(Counter(threads[started:]).values()) == [2, 2]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cut.jsonl", "pairs.jsonl", "straight.jsonl"]
    (tmp_path / ".cut.jsonl.rows").write_text('{"tokenizer": "another"}\n{"key": "0.png"}\n')
    path.unlink()
    assert encode(tokenizer, path, index) == straight


def test_images_that_cannot_be_encoded_are_left_out(tokenizer, data, rows, tmp_path, caplog):
    rows = [row | {"key": str(number)} for number, row in enumerate(rows)]
    encode(tokenizer, tmp_path / "all.jsonl", write_rows(tmp_path / "pairs.jsonl", rows))
    (tmp_path / "cut.png").write_bytes((data / "5.png").read_bytes()[:200])
    Image.new("RGB", (2, 2)).save(tmp_path / "tiny.png")
    rows[5]["path"], rows[7]["path"] = str(tmp_path / "cut.png"), str(tmp_path / "tiny.png")
    index = write_rows(tmp_path / "pairs.jsonl", rows)
    content = encode(tokenizer, tmp_path / "some.jsonl", index)
    expected = [pair for pair in read_encoded(tmp_path / "all.jsonl") if pair.key not in ("5", "7")]
    assert read_encoded(tmp_path / "some.jsonl") == expected
    assert "data.index: 5 is skipped" in caplog.text
    assert "smaller than its guide" in caplog.text
    assert encode(tokenizer, tmp_path / "some.jsonl", index) == content


def test_images_that_are_missing_for_a_while_are_encoded_by_the_next_call(
    tokenizer, data, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(encoded_pairs, "_PER_RANK", 2)
    monkeypatch.setattr(encoded_pairs, "MAX_CONSECUTIVE_FAILURES", 3)
    for number in range(4, 8):
        rows[number]["path"] = str(tmp_path / "disk" / f"{number}.png")
    index, path = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "sequences.jsonl"
    with pytest.raises(UserError, match=r"data\.index: 4 images in a row .*7\.png: no such file"):
        encode(tokenizer, path, index)
    assert not path.exists()
    (tmp_path / "disk").symlink_to(data)
    encode(tokenizer, path, index)
    assert [pair.key for pair in read_encoded(path)] == [row["path"] for row in rows]


def test_pairs_that_no_run_can_encode_are_refused(tokenizer, rows, tmp_path):
    index, other = (write_rows(tmp_path / f"{count}.jsonl", rows[:count]) for count in (8, 7))

    def refused(ranks):
        with pytest.raises(UserError) as caught:
            encode(tokenizer, tmp_path / "sequences.jsonl", other if ranks.rank else index, ranks)
        return str(caught.value)

    first, second = on_thread_ranks(2, refused)
    assert first == second
    assert "differs from rank 0's: all ranks must see the same files (on rank 1)" in first
    config = LanguageDataConfig(grids=[2, [1, 5]])
    with pytest.raises(UserError, match=r"data\.grids: expected at most 4 tokens per side, got 5"):
        encode_pairs(tmp_path / "s.jsonl", str(index), "data.index", tokenizer, config, 0, Ranks())


def test_the_largest_step_has_the_longest_sequences_and_captions(data):
    values = read_yaml("configs/dual_token/nano_language.yaml")
    task = LanguageTask.__new__(LanguageTask)  # without an engine
    task.config, task.ranks = fill(RUNS["dual_language"], values, ["data.batch_size=2"]), Ranks()
    task.pairs = [EncodedPair(str(length), "a", [1] * length) for length in (5, 3, 9, 4)]
    task.target = open_text_target(str(data / "encoder"), 4)
    task.model = torch.nn.Linear(1, 1)
    seen = []

    def loss(model, pairs, texts):
        seen.append(([len(pair.ids) for pair in pairs], [len(text) for text in texts]))
        return torch.zeros((), requires_grad=True)

    task._loss = loss
    task.largest_step().run()
    assert seen == [([9, 5], [4, 4])]


def test_invalid_settings_are_refused():
    values = read_yaml("configs/dual_token/nano_language.yaml")
    for override, words in (
        ("data.grids=[]", "data.grids"),
        ("data.caption_dropout=1", "data.caption_dropout"),
        ("accumulation_steps=2", "raise data.batch_size"),
        ("logging.grid_every_steps=5", "dual generate"),
    ):
        with pytest.raises(UserError, match=words):
            fill(RUNS["dual_language"], values, [override])


def test_other_captions_differ():
    assert _other_captions(["a", "a", "b"]) == ["b", "b", "a"]
    assert _other_captions(["a", "a"]) == ["a", "a"]
