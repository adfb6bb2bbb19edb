"""One folder holds one demo: the same settings go on in it, others are refused."""

import json
from dataclasses import asdict, replace

import pytest

from cat_fast.demo import DemoSettings
from cat_fast.demo.run import _claim
from cat_fast.errors import UserError

SETTINGS = DemoSettings(tokenizer_steps=10, generator_steps=5, ranks=2)


def test_the_first_run_notes_its_settings_and_the_next_goes_on(tmp_path, capsys):
    _claim(tmp_path / "new" / "demo", SETTINGS)
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / "new" / "demo" / "settings.json").read_text()) == asdict(SETTINGS)
    _claim(tmp_path / "new" / "demo", SETTINGS)
    assert "going on in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer_steps": 11}, "(tokenizer_steps)"),
        ({"ranks": 1, "resolution": 64}, "(ranks, resolution)"),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path, changes, named):
    _claim(tmp_path, SETTINGS)
    before = (tmp_path / "settings.json").read_text()
    with pytest.raises(UserError, match="other settings") as caught:
        _claim(tmp_path, replace(SETTINGS, **changes))
    assert named in str(caught.value)
    assert "another --out" in str(caught.value)
    assert (tmp_path / "settings.json").read_text() == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        _claim(tmp_path / "file" / "demo", SETTINGS)
