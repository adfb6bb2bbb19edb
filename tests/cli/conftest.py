"""Fixtures: a tokenizer small enough to run in milliseconds, test images, and a command-line runner."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from cat_fast.cli.main import app
from cat_fast.tokenizer import NestedAutoencoderKL


def tiny_tokenizer(seed: int = 0, **changes) -> NestedAutoencoderKL:
    """Return an untrained tokenizer with all six blocks."""
    torch.manual_seed(seed)
    settings = {
        "sample_size": 64,
        "block_out_channels": (8, 8, 8, 8, 8, 8),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_num_layers": 1,
    }
    return NestedAutoencoderKL(**(settings | changes)).eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a saved tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Three photographs of different noise and format: a.jpg (landscape), b.png (portrait), c.webp."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, (width, height) in {"a.jpg": (96, 64), "b.png": (80, 120), "c.webp": (64, 64)}.items():
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / name)
    return folder


@pytest.fixture
def cat_fast():
    """Function that runs `cat-fast ARGS...` in this process."""

    def run(*args: object) -> Result:
        return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="cat-fast")

    return run


def assert_one_line_error(result: Result, *words: str) -> None:
    """Check for exit code 2, empty stdout, and one line `error: ...` with `words` on stderr."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def parse_json(result: Result) -> dict:
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)
