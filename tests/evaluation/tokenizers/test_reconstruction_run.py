"""What an evaluation of reconstructions may resume."""

from types import SimpleNamespace

import pytest
from PIL import Image

from cat_fast.errors import UserError
from cat_fast.evaluation.tokenizers.columns import parse_columns
from cat_fast.evaluation.tokenizers.protocol import open_tokenizer
from cat_fast.evaluation.tokenizers.run import ReconstructionRun, ReconstructionSettings
from cat_fast.evaluation.tokenizers.samples import open_samples
from tests.cli.conftest import tiny_tokenizer


def test_parts_of_an_image_that_was_replaced_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 40)).save(tmp_path / "images" / f"{name}.png")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    columns = parse_columns(open_tokenizer(str(tmp_path / "tokenizer"), "cpu", "ours"), ["16"])
    network, perceptual = SimpleNamespace(checksum="0"), SimpleNamespace(record={})

    def make_run():
        samples = open_samples(str(tmp_path / "images"), None, needs_scores=False)
        settings = ReconstructionSettings(size=32, ocr=False, faces=False)
        return ReconstructionRun(samples, columns, settings, network, perceptual, tmp_path / "out")

    make_run()
    make_run()
    Image.new("RGB", (80, 80)).save(tmp_path / "images" / "b.png")
    with pytest.raises(UserError, match=r"an evaluation made with other settings \(files"):
        make_run()
