"""A generator's run takes latents of its own tokenizer only: when it begins, and when it goes on."""

import json
from types import SimpleNamespace

import pytest

from cat_fast.config import fill
from cat_fast.errors import UserError
from cat_fast.training.config.settings import GeneratorRun
from cat_fast.training.generator import task as generator_task
from cat_fast.training.generator.task import GeneratorTask
from cat_fast.training.runtime.ranks import Ranks
from tests.cli.conftest import tiny_tokenizer
from tests.training.runs import write_latents


class LetIn(Exception):
    pass


def begin(latents, tokenizer, monkeypatch):
    """Up to where the model would be built."""

    def build_model(*_):
        raise LetIn

    monkeypatch.setattr(generator_task, "build_model", build_model)
    data = {"latents": str(latents), "tokenizer": str(tokenizer)}
    GeneratorTask(fill(GeneratorRun, {"task": "generator", "output_dir": "none", "data": data}, []), Ranks())


def test_latents_of_another_tokenizer_do_not_begin_a_run(tmp_path, monkeypatch):
    latents = write_latents(tmp_path / "latents")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=f"latents of tokenizer {tokenizer.fingerprint()}, got 0{{16}}"):
        begin(latents, tmp_path / "tokenizer", monkeypatch)
    with pytest.raises(UserError, match="no such folder"):
        begin(latents, tmp_path / "none", monkeypatch)
    header = latents / "latents.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"fingerprint": tokenizer.fingerprint()}))
    with pytest.raises(UserError, match="like the other shards"):  # the shards know better than the folder
        begin(latents, tmp_path / "tokenizer", monkeypatch)
    for path in latents.glob("shard-*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": tokenizer.fingerprint()}))
    with pytest.raises(LetIn):
        begin(latents, tmp_path / "tokenizer", monkeypatch)


def test_a_tokenizer_need_not_be_named(tmp_path, monkeypatch):
    with pytest.raises(LetIn):
        begin(write_latents(tmp_path), "", monkeypatch)


def test_latents_of_another_tokenizer_do_not_go_on_with_a_run(tmp_path):
    (tmp_path / "task.json").write_text(json.dumps({"ema_updates": 3, "tokenizer": "abc"}))
    task = object.__new__(GeneratorTask)
    task.latents = SimpleNamespace(fingerprint="xyz")
    with pytest.raises(UserError, match="began on latents of tokenizer abc, these are of xyz"):
        task.load(tmp_path)
