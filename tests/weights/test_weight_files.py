"""Files that safetensors writes have the mode of ordinary files, which depends on the umask."""

import os
import stat

import pytest
import torch
from torch import nn

from cat_fast.data.latents.dataset import LatentShardWriter
from cat_fast.generator import DiT
from cat_fast.inference.encoding.latent_file import LatentRecord, write_latents
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.training.runtime.ema import EMA
from tests.cli.conftest import tiny_tokenizer


def save_latent_file(folder):
    record = LatentRecord(ratio=16, size=64, source="a.png")
    write_latents(
        folder / "x.safetensors", {"a": torch.zeros(4, 4, 4)}, {"a": record}, tokenizer="0", made_with={}
    )


def save_latent_shards(folder):
    with LatentShardWriter(folder, "0", resolution=64, class_names=["image"]) as writer:
        writer.add(f"{len(list(folder.iterdir()))}", torch.zeros(4, 4, 4), label=0, ratio=16)


WRITERS = {
    "latent file": save_latent_file,
    "latent shards": save_latent_shards,
    "ema": lambda folder: EMA(nn.Linear(2, 2), 0.9).save(folder / "ema.safetensors"),
    "tokenizer": lambda folder: tiny_tokenizer().save_pretrained(folder),
    "tokenizer in parts": lambda folder: tiny_tokenizer().save_pretrained(folder, max_shard_size="20KB"),
    "transformer": lambda folder: DiT(
        in_channels=4, hidden_size=48, depth=1, num_heads=2, num_classes=3, position_frame=4
    ).save_pretrained(folder),
}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_file_has_the_mode_of_a_new_file(writer, umask, tmp_path):
    before = os.umask(umask)
    try:
        for _ in range(2):  # also files that replace others
            WRITERS[writer](tmp_path)
    finally:
        os.umask(before)
    files = list(tmp_path.rglob("*.*"))
    assert any(path.suffix == ".safetensors" for path in files)
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == {
        path.name: 0o666 & ~umask for path in files
    }


def test_the_folder_that_a_model_was_loaded_from_is_not_saved(tmp_path):
    model = tiny_tokenizer()
    model.save_pretrained(tmp_path / "first")
    again = NestedAutoencoderKL.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    written = (tmp_path / "second" / "config.json").read_text()
    assert str(tmp_path) not in written
    assert written == (tmp_path / "first" / "config.json").read_text()
