"""Training checkpoints with several state dicts give their averaged weights."""

import itertools

import pytest
import torch

from cat_fast.weights.state_file import read_state

CHECKPOINT = {
    "model": {"weight": torch.tensor([1.0])},
    "state_dict": {"weight": torch.tensor([2.0])},
    "ema": {"weight": torch.tensor([3.0])},
    "opt": {"state": {0: torch.tensor([4.0])}},
    "args": {"model": "DiT-XL/2"},
}


@pytest.mark.parametrize("names", [*itertools.permutations(["model", "state_dict", "ema"])], ids="-".join)
def test_averaged_weights_are_preferred_in_any_order(names):
    ordered = {name: CHECKPOINT[name] for name in ("opt", *names, "args")}
    assert read_state(ordered) == {"weight": torch.tensor([3.0])}


@pytest.mark.parametrize("name", ["ema", "state_dict", "model"])
def test_the_only_state_dict_of_a_checkpoint_is_read(tmp_path, name):
    path = tmp_path / "checkpoint.pt"
    torch.save({"opt": CHECKPOINT["opt"], name: CHECKPOINT[name], "step": 7}, path)
    assert read_state(path) == CHECKPOINT[name]


def test_averaged_weights_that_are_no_tensors_are_passed_over():
    decay = {"ema": {"decay": 0.999}, "model": CHECKPOINT["model"]}
    assert read_state(decay) == CHECKPOINT["model"]
