"""Folder settings: content made with other settings is rejected, with the differences."""

import json
import re

import pytest

from cat_fast.data.folder_settings import claim_folder
from cat_fast.errors import UserError

SETTINGS = {"steps": 10, "mix": (8, 16), "model": {"width": 4, "path": None}}


def test_a_repeated_claim_is_recognised(tmp_path):
    path = tmp_path / "new" / "settings.json"
    assert not claim_folder(path, SETTINGS, "latents")
    assert json.loads(path.read_text()) == SETTINGS | {"mix": [8, 16]}
    assert claim_folder(path, SETTINGS, "latents")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 11}, "steps: 10, not 11"),
        ({"steps": "x" * 100}, "steps"),
        ({"model": {"width": 5, "path": "a"}}, "model.width: 4, not 5, model.path: None, not 'a'"),
        ({"more": True}, "more: None, not True"),
    ],
)
def test_other_settings_are_rejected_with_the_differences(tmp_path, changes, named):
    path = tmp_path / "settings.json"
    claim_folder(path, SETTINGS, "a demo")
    before = path.read_bytes()
    message = f"{tmp_path} contains a demo made with other settings ({named}); choose another folder"
    with pytest.raises(UserError, match=re.escape(message)):
        claim_folder(path, {**SETTINGS, **changes}, "a demo")
    assert path.read_bytes() == before


def test_folders_of_earlier_versions_without_a_library_of_products_used_mkl(tmp_path):
    for name, earlier in (("null", {"linear_backend": None}), ("missing", {})):
        path = tmp_path / f"{name}.json"
        claim_folder(path, {"settings": earlier}, "images")
        claim_folder(path, {"settings": {"linear_backend": "mkl"}}, "images")
        with pytest.raises(UserError, match=r"settings\.linear_backend: None, not 'onednn'"):
            claim_folder(path, {"settings": {"linear_backend": "onednn"}}, "images")


def test_settings_that_no_longer_exist_are_rejected(tmp_path):
    path = tmp_path / "settings.json"
    claim_folder(path, {**SETTINGS, "former": 1}, "images")
    with pytest.raises(UserError, match="former: 1, not None"):
        claim_folder(path, SETTINGS, "images")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"3"])
def test_a_damaged_file_is_rejected(tmp_path, content):
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(UserError, match=r"choose another folder"):
        claim_folder(tmp_path / "settings.json", SETTINGS, "images")


def test_a_folder_that_cannot_be_created_is_rejected(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        claim_folder(tmp_path / "file" / "settings.json", SETTINGS, "images")


def test_the_first_of_concurrent_claims_counts(tmp_path, monkeypatch):
    path = tmp_path / "settings.json"
    claim_folder(path, SETTINGS, "latents")
    monkeypatch.setattr(type(path), "exists", lambda self: False)  # as seen before the other process wrote it
    assert not claim_folder(path, SETTINGS, "latents")
    with pytest.raises(UserError, match="steps"):
        claim_folder(path, {**SETTINGS, "steps": 1}, "latents")
