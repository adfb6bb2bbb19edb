"""A generator run accepts only latents of its tokenizer, at the start and when it resumes."""

import json
from types import SimpleNamespace

import pytest

from benchmarks.shared.random_latents import write_latents
from cat_fast.config import fill
from cat_fast.errors import UserError
from cat_fast.training.config.settings import GeneratorRun
from cat_fast.training.generator import task as generator_task
from cat_fast.training.generator.task import GeneratorTask
from cat_fast.training.runtime.ranks import Ranks
from tests.cli.conftest import tiny_tokenizer


class ModelReached(Exception):
    """Raised instead of building the model."""


def begin(latents, tokenizer, monkeypatch):
    """Start a run up to the construction of the model."""

    def build_model(*_):
        raise ModelReached

    monkeypatch.setattr(generator_task, "build_model", build_model)
    data = {"latents": str(latents), "tokenizer": str(tokenizer)}
    GeneratorTask(fill(GeneratorRun, {"task": "generator", "output_dir": "none", "data": data}, []), Ranks())


def test_latents_of_another_tokenizer_are_refused(tmp_path, monkeypatch):
    latents = write_latents(tmp_path / "latents")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=f"latents of tokenizer {tokenizer.fingerprint()}, got 0{{16}}"):
        begin(latents, tmp_path / "tokenizer", monkeypatch)
    with pytest.raises(UserError, match="no such folder"):
        begin(latents, tmp_path / "none", monkeypatch)
    header = latents / "latents.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"fingerprint": tokenizer.fingerprint()}))
    with pytest.raises(UserError, match="like the other shards"):  # the shards' fingerprints count
        begin(latents, tmp_path / "tokenizer", monkeypatch)
    for path in latents.glob("shard-*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": tokenizer.fingerprint()}))
    with pytest.raises(ModelReached):
        begin(latents, tmp_path / "tokenizer", monkeypatch)


def test_tokenizer_is_optional(tmp_path, monkeypatch):
    with pytest.raises(ModelReached):
        begin(write_latents(tmp_path), "", monkeypatch)


def test_latents_of_another_tokenizer_are_refused_on_resume(tmp_path):
    (tmp_path / "task.json").write_text(json.dumps({"ema_updates": 3, "tokenizer": "abc"}))
    task = object.__new__(GeneratorTask)
    task.latents = SimpleNamespace(fingerprint="xyz")
    with pytest.raises(UserError, match=r"expected latents of tokenizer abc, .* got xyz"):
        task.load(tmp_path)
