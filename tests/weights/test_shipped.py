"""Models that ship with the package are found by name, offline, after local folders of the same name."""

import pytest
from huggingface_hub import constants

from cat_fast import CATPipeline, NestedAutoencoderKL
from cat_fast.errors import UserError
from cat_fast.models.load import load_tokenizer
from cat_fast.weights import shipped
from tests.cli.conftest import tiny_tokenizer


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Folder of the shipped models, empty; without network and in an empty working directory."""
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path / "weights" / "shipped_models")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "weights" / "shipped_models"


def test_an_installation_without_the_weights_is_named(installed):
    for load in (NestedAutoencoderKL.from_pretrained, CATPipeline.from_pretrained, load_tokenizer):
        with pytest.raises(UserError, match=r"^nano: this installation of cat_fast lacks the shipped models"):
            load("nano")
    with pytest.raises(UserError, match="nano-fixed-16x: this installation"):
        NestedAutoencoderKL.from_pretrained("nano-fixed-16x")


def test_a_local_folder_of_the_same_name_comes_first(installed, tmp_path):
    ours, theirs = tiny_tokenizer(), tiny_tokenizer(norm_num_groups=2)
    ours.half().save_pretrained(installed / "nano" / "vae")
    assert NestedAutoencoderKL.from_pretrained("nano").config.norm_num_groups == 4
    assert load_tokenizer("nano", "cpu").config.norm_num_groups == 4
    theirs.save_pretrained(tmp_path / "work" / "nano")
    assert NestedAutoencoderKL.from_pretrained("nano").config.norm_num_groups == 2
    assert shipped.installed_folder("nano", "vae") == installed / "nano" / "vae"


def test_other_names_are_none_of_the_shipped_models(installed):
    assert shipped.shipped_folder("nanometre") is None
    assert shipped.shipped_folder("owner/nano") is None
