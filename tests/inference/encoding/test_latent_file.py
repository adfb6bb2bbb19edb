"""Latent files: round trip, atomic writes, and rejection of other files."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from cat_fast.data.ratio_origin import ScoredBy
from cat_fast.errors import UserError
from cat_fast.inference.encoding.latent_file import LatentFile, LatentRecord, unique_keys, write_latents

RECORDS = {
    "cat": LatentRecord(ratio=8, size=64, source="cat.jpg", score=7, why="ein Kätzchen"),
    "dög": LatentRecord(
        ratio=32,
        size=64,
        source="dög.png",
        scored_by=ScoredBy("words", "1", (2, 6)),
        thresholds=(4, 7),
        jpeg_thresholds=(30, 60),
    ),
}


@pytest.fixture
def latents():
    generator = torch.Generator().manual_seed(0)
    return {
        "cat": torch.randn(4, 8, 8, generator=generator),
        "dög": torch.randn(4, 2, 2, generator=generator),
    }


@pytest.fixture
def path(tmp_path, latents):
    write_latents(tmp_path / "a.safetensors", latents, RECORDS, tokenizer="0123abcd", made_with={})
    return tmp_path / "a.safetensors"


def test_round_trip(path, latents):
    stored = LatentFile.open(path)
    assert stored.tokenizer == "0123abcd"
    assert stored.records == RECORDS
    assert stored.shapes == {"cat": (4, 8, 8), "dög": (4, 2, 2)}
    for key, latent in latents.items():
        torch.testing.assert_close(stored.load(key), latent, rtol=0, atol=0)


def test_any_safetensors_reader_can_read_the_tensors(path, latents):
    plain = load_file(path)
    assert plain.keys() == latents.keys()
    assert all(torch.equal(plain[key], latents[key]) for key in latents)


def test_half_precision_and_strided_latents_are_stored_as_contiguous_float32(tmp_path, latents):
    strided = {"cat": latents["cat"].bfloat16().transpose(1, 2), "dög": latents["dög"][:, :, ::2]}
    write_latents(tmp_path / "b.safetensors", strided, RECORDS, tokenizer="0", made_with={})
    stored = LatentFile.open(tmp_path / "b.safetensors")
    for key, latent in strided.items():
        torch.testing.assert_close(stored.load(key), latent.float(), rtol=0, atol=0)


def test_failed_write_keeps_the_old_file(path, latents):
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        write_latents(path, latents | {"not a tensor": None}, RECORDS, tokenizer="0", made_with={})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda header: "not json", "header is damaged"),
        (lambda header: "[]", "header is damaged"),
        (lambda header: json.dumps({"version": 1, "tokenizer": "0"}), "header is damaged"),
        (lambda header: header.replace('"ratio"', '"rate"'), "header is damaged"),
        (lambda header: header.replace('"version": 1', '"version": 2'), "got version 2"),
        (lambda header: header.replace('"cat"', '"cow"'), "does not match the tensors"),
    ],
)
def test_invalid_header_is_rejected(path, latents, change, reason):
    images = {key: asdict(record) for key, record in RECORDS.items()}
    header = json.dumps({"version": 1, "tokenizer": "0", "images": images})
    save_file(latents, path, metadata={"cat_fast.latents": change(header)})
    with pytest.raises(UserError, match=reason):
        LatentFile.open(path)


def test_truncated_file_is_rejected(path):
    complete = path.read_bytes()
    for length in (4, 40, len(complete) // 2, len(complete) - 1):
        path.write_bytes(complete[:length])
        with pytest.raises(UserError, match="damaged"):
            LatentFile.open(path)


def test_repeated_keys_get_the_next_free_number():
    keys = ["a", "a", "a-2", "a", "b", "__metadata__", "a-3"]
    assert unique_keys(keys) == ["a", "a-2", "a-2-2", "a-3", "b", "__metadata__-2", "a-3-2"]


def test_the_numbers_of_a_repeated_key_are_tried_once():
    tried = []

    class Key(str):
        def __format__(self, spec: str) -> str:
            tried.append(self)
            return str.__format__(self, spec)

    assert unique_keys([Key("image")] * 100)[-1] == "image-100"
    assert len(tried) == 99
