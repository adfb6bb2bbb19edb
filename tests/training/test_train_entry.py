"""What the entry point refuses before it trains."""

import pytest

from cat_fast.errors import UserError
from cat_fast.train import train


def test_a_preset_insists_on_its_number_of_ranks(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    path = tmp_path / "preset.yaml"
    path.write_text("task: tokenizer\noutput_dir: runs/x\nworld_size: 64\n")
    with pytest.raises(UserError, match="made for 64 ranks, and there are 1: start as many"):
        train(str(path), [])
