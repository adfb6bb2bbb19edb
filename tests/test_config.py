"""Run configurations: parsing, error messages, and validity of the packaged files."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from cat_fast.config import fill, read_yaml
from cat_fast.errors import UserError
from cat_fast.generator import DiT
from cat_fast.models.build import build_model
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.training.config.deepspeed_json import read_deepspeed_config
from cat_fast.training.config.runs import RUNS

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(kw_only=True)
class Schedule:
    total_steps: int = 10
    rates: list[float] = field(default_factory=lambda: [0.1])


@dataclass(kw_only=True)
class Run:
    name: str
    seed: int = 0
    shares: dict[int, float] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self):
        if self.seed < 0:
            raise UserError(f"seed: {self.seed} is negative")


def error_of(values, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        fill(Run, values, list(overrides), source="configuration run.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_values_keep_their_defaults():
    run = fill(Run, {"name": "a", "schedule": {"rates": [1, 2.5]}, "shares": {8: 1}}, [])
    assert run == Run(name="a", shares={8: 1.0}, schedule=Schedule(rates=[1.0, 2.5]))


def test_overrides_reach_nested_keys_and_win_over_the_file():
    values = {"name": "a", "seed": 1, "schedule": {"total_steps": 5}}
    run = fill(Run, values, ["schedule.total_steps=7", "seed=2", "shares={8: 0.5, 16: 0.5}", "name=x=y"])
    assert run == Run(name="x=y", seed=2, shares={8: 0.5, 16: 0.5}, schedule=Schedule(total_steps=7))
    assert values == {"name": "a", "seed": 1, "schedule": {"total_steps": 5}}


@pytest.mark.parametrize("override", ["name=''", "name="])
def test_string_can_be_set_empty_even_if_the_shell_strips_the_quotes(override):
    assert fill(Run, {"name": "a"}, [override]).name == ""


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("sede", "seed"), ("schedule.total_step", "schedule.total_steps"), ("shedule.rates", "schedule")],
)
def test_error_for_unknown_key_suggests_the_nearest_one(wrong, meant):
    message = error_of({"name": "a"}, f"{wrong}=1")
    assert message.startswith("configuration run.yaml: unknown key ")
    assert f"did you mean '{meant}" in message


def test_unknown_key_in_the_file_is_named_without_suggestion_if_none_is_near():
    assert "'schedule.total_stepps'; did you mean 'schedule.total_steps'" in error_of(
        {"name": "a", "schedule": {"total_stepps": 1}}
    )
    assert error_of({"name": "a", "qqqq": 1}) == "configuration run.yaml: unknown key 'qqqq'"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=many", "seed"),
        ("schedule.total_steps=1.5", "schedule.total_steps"),
        ("schedule.rates=[a]", "schedule.rates"),
        ("shares={eight: 1}", "shares"),
        ("seed=", "seed"),
    ],
)
def test_error_for_wrong_type_names_the_key(override, key):
    assert error_of({"name": "a"}, override).startswith(f"configuration run.yaml: {key}")


def test_error_for_missing_key_names_it():
    assert "name" in error_of({"seed": 1})


def test_error_raised_by_the_dataclass_is_kept():
    assert error_of({"name": "a"}, "seed=-1") == "seed: -1 is negative"


@pytest.mark.parametrize("override", ["seed", "=1", ""])
def test_malformed_override_is_rejected_with_an_example(override):
    assert "expected key=value" in error_of({"name": "a"}, override)


@pytest.mark.parametrize("override", ["schedule.rates=[1", "shares={8: 1", "name='a"])
def test_error_for_override_with_invalid_yaml_quotes_it(override):
    assert repr(override) in error_of({"name": "a"}, override)


def test_error_for_missing_file_lists_files_in_the_folder(tmp_path):
    for name in ("small.yaml", "large.yaml", "notes.txt"):
        (tmp_path / name).write_text("a: 1\n")
    with pytest.raises(UserError, match="no such file") as caught:
        read_yaml(tmp_path / "smal.yaml")
    assert str(tmp_path / "large.yaml") in str(caught.value)
    assert str(tmp_path / "small.yaml") in str(caught.value)
    assert "notes.txt" not in str(caught.value)
    with pytest.raises(UserError, match=r"no such file$"):
        read_yaml(tmp_path / "no" / "such" / "folder.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "a: ${nowhere}\n"])
def test_file_that_is_not_a_yaml_mapping_is_rejected_on_one_line(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("tokenizer/*.yaml")), ids=lambda p: p.stem)
def test_every_tokenizer_configuration_is_valid_and_builds(path):
    values = read_yaml(path)
    assert values["task"] == "tokenizer"
    config = fill(RUNS["tokenizer"], values, [])
    with torch.device("meta"):
        model = build_model(NestedAutoencoderKL, config.model)
    assert {ratio for ratio, share in config.sampler.shares.items() if share} <= set(model.ratios)
    assert config.data.image_size % max(model.ratios) == 0
    assert read_deepspeed_config(config.deepspeed)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("generator/*.yaml")), ids=lambda p: p.stem)
def test_every_generator_configuration_is_valid_and_builds(path):
    values = read_yaml(path)
    assert values["task"] == "generator"
    config = fill(RUNS["generator"], values, [])
    from_data = {"in_channels": 16, "num_classes": 6} | ({"text_dim": 384} if config.text_encoder else {})
    with torch.device("meta"):
        model = build_model(DiT, {**from_data, **config.model})
    assert model.config.num_classes == 6
    assert read_deepspeed_config(config.deepspeed)


def test_nano_configurations_exist():
    assert (CONFIGS / "tokenizer" / "nano.yaml").is_file()
    assert (CONFIGS / "generator" / "nano.yaml").is_file()


@pytest.mark.parametrize("kind", [NestedAutoencoderKL, DiT])
def test_unknown_model_argument_is_rejected(kind):
    with pytest.raises(UserError, match=r"model: .*no_such_argument"):
        build_model(kind, {"no_such_argument": 1})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("deepspeed/*.json")), ids=lambda p: p.stem)
def test_every_deepspeed_configuration_is_accepted(path, monkeypatch, tmp_path):
    assert read_deepspeed_config(str(path))["zero_optimization"]["stage"] in (1, 2, 3)
    # Packaged names are found from any working directory.
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed_config(f"deepspeed/{path.name}") == read_deepspeed_config(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stage": 4}}', "expected ZeRO stage 0, 1, 2 or 3, got 4"),
        ('{"bf16": {"enabled": true}}', r"enables bf16; set precision=fp32\|bf16"),
        ('{"zero_optimization": ', "is not valid JSON"),
    ],
)
def test_unsupported_deepspeed_configuration_is_rejected(tmp_path, text, message):
    path = tmp_path / "zero.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_deepspeed_config(str(path))


def test_missing_deepspeed_configuration_is_rejected():
    with pytest.raises(UserError, match=r"nowhere\.json is neither a file nor a packaged"):
        read_deepspeed_config("nowhere.json")


def test_configuration_overrides_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("name: a\nschedule: {steps: 10, rates: [1, 2]}\nshares: {8: 0.5}\n")
    (tmp_path / "middle.yaml").write_text("base: base.yaml\nschedule: {steps: 20}\nshares: {16: 0.5}\n")
    (tmp_path / "top.yaml").write_text("base: middle.yaml\nname: b\nschedule: {rates: [3]}\n")
    assert read_yaml(tmp_path / "top.yaml") == {
        "name": "b",
        "schedule": {"steps": 20, "rates": [3]},
        "shares": {8: 0.5, 16: 0.5},
    }


def test_cyclic_or_missing_bases_are_rejected(tmp_path):
    (tmp_path / "one.yaml").write_text("base: two.yaml\n")
    (tmp_path / "two.yaml").write_text("base: one.yaml\n")
    with pytest.raises(UserError, match=r"one\.yaml: the file is its own base, through .*two\.yaml"):
        read_yaml(tmp_path / "one.yaml")
    (tmp_path / "three.yaml").write_text("base: four.yaml\n")
    with pytest.raises(UserError, match=r"four\.yaml: no such file"):
        read_yaml(tmp_path / "three.yaml")
