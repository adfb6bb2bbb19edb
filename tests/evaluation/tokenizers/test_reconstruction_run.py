"""What an evaluation of reconstructions may resume."""

import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from cat_fast.errors import UserError
from cat_fast.evaluation.tokenizers.columns import parse_columns
from cat_fast.evaluation.tokenizers.protocol import open_tokenizer
from cat_fast.evaluation.tokenizers.run import ReconstructionRun, ReconstructionSettings
from cat_fast.evaluation.tokenizers.samples import open_samples
from tests.cli.conftest import tiny_tokenizer

Start = Callable[[], ReconstructionRun]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start or resume the evaluation of the images in the folder `images`."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    columns = parse_columns(open_tokenizer(str(tmp_path / "tokenizer"), "cpu", "ours"), ["16"])
    network, perceptual = SimpleNamespace(checksum="0"), SimpleNamespace(record={})
    (tmp_path / "images").mkdir()

    def make_run() -> ReconstructionRun:
        samples = open_samples(str(tmp_path / "images"), None, needs_scores=False)
        settings = ReconstructionSettings(size=32, ocr=False, faces=False)
        return ReconstructionRun(samples, columns, settings, network, perceptual, tmp_path / "out")

    return make_run


def test_parts_of_an_image_that_was_replaced_are_refused(tmp_path: Path, start: Start) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (40, 40)).save(tmp_path / "images" / f"{name}.png")
    start()
    start()
    Image.new("RGB", (80, 80)).save(tmp_path / "images" / "b.png")
    with pytest.raises(UserError, match=r"an evaluation made with other settings \(files"):
        start()


def test_parts_of_an_archive_that_was_replaced_are_refused(tmp_path: Path, start: Start) -> None:
    def write(shade: int) -> None:
        Image.new("RGB", (40, 40), (shade, shade, shade)).save(tmp_path / "k.png")
        with tarfile.open(tmp_path / "images" / "a.tar", "w") as archive:
            archive.add(tmp_path / "k.png", "k.png")
        os.utime(tmp_path / "images" / "a.tar", (shade, shade))

    write(10)
    start()
    start()
    write(20)
    with pytest.raises(UserError, match=r"an evaluation made with other settings \(files"):
        start()
