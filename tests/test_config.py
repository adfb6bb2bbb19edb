"""Configurations as a user writes them: what is refused and in which words, and that those that ship fit."""

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
from cat_fast.training.config.settings import RUNS

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


def refusal(values, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        fill(Run, values, list(overrides), source="configuration run.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_fill_the_dataclass_and_the_rest_keeps_its_defaults():
    run = fill(Run, {"name": "a", "schedule": {"rates": [1, 2.5]}, "shares": {8: 1}}, [])
    assert run == Run(name="a", shares={8: 1.0}, schedule=Schedule(rates=[1.0, 2.5]))


def test_overrides_reach_nested_keys_and_win_over_the_file():
    values = {"name": "a", "seed": 1, "schedule": {"total_steps": 5}}
    run = fill(Run, values, ["schedule.total_steps=7", "seed=2", "shares={8: 0.5, 16: 0.5}", "name=x=y"])
    assert run == Run(name="x=y", seed=2, shares={8: 0.5, 16: 0.5}, schedule=Schedule(total_steps=7))
    assert values == {"name": "a", "seed": 1, "schedule": {"total_steps": 5}}


@pytest.mark.parametrize("override", ["name=''", "name="])
def test_text_can_be_emptied_also_where_a_shell_takes_the_quotes(override):
    assert fill(Run, {"name": "a"}, [override]).name == ""


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("sede", "seed"), ("schedule.total_step", "schedule.total_steps"), ("shedule.rates", "schedule")],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(wrong, meant):
    message = refusal({"name": "a"}, f"{wrong}=1")
    assert message.startswith("configuration run.yaml: unknown key ")
    assert f"did you mean '{meant}" in message


def test_an_unknown_key_of_the_file_is_named_too_and_far_ones_get_no_guess():
    assert "'schedule.total_stepps'; did you mean 'schedule.total_steps'" in refusal(
        {"name": "a", "schedule": {"total_stepps": 1}}
    )
    assert refusal({"name": "a", "qqqq": 1}) == "configuration run.yaml: unknown key 'qqqq'"


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
def test_a_value_of_the_wrong_type_is_refused_by_its_key(override, key):
    assert refusal({"name": "a"}, override).startswith(f"configuration run.yaml: {key}")


def test_a_mandatory_key_that_is_missing_is_named():
    assert "name" in refusal({"seed": 1})


def test_a_value_the_dataclass_refuses_keeps_its_own_words():
    assert refusal({"name": "a"}, "seed=-1") == "seed: -1 is negative"


@pytest.mark.parametrize("override", ["seed", "=1", ""])
def test_an_override_that_is_no_pair_says_what_one_looks_like(override):
    assert "key=value was expected" in refusal({"name": "a"}, override)


@pytest.mark.parametrize("override", ["schedule.rates=[1", "shares={8: 1", "name='a"])
def test_an_override_with_broken_yaml_is_quoted(override):
    assert repr(override) in refusal({"name": "a"}, override)


def test_a_missing_file_names_its_neighbours(tmp_path):
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
def test_a_file_that_is_no_mapping_or_no_yaml_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("tokenizer/*.yaml")), ids=lambda p: p.stem)
def test_every_tokenizer_configuration_fills_its_schema_and_builds(path):
    values = read_yaml(path)
    assert values["task"] == "tokenizer"
    config = fill(RUNS["tokenizer"], values, [])
    with torch.device("meta"):
        model = build_model(NestedAutoencoderKL, config.model)
    assert set(config.sampler.shares) <= set(model.ratios)
    assert config.data.image_size % max(model.ratios) == 0
    assert read_deepspeed_config(config.deepspeed)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("generator/*.yaml")), ids=lambda p: p.stem)
def test_every_generator_configuration_fills_its_schema_and_builds(path):
    values = read_yaml(path)
    assert values["task"] == "generator"
    config = fill(RUNS["generator"], values, [])
    from_latents = {"in_channels": 16, "num_classes": 6}
    with torch.device("meta"):
        model = build_model(DiT, {**from_latents, **config.model})
    assert model.config.num_classes == 6
    assert read_deepspeed_config(config.deepspeed)


def test_both_kinds_ship_a_configuration():
    assert (CONFIGS / "tokenizer" / "nano.yaml").is_file()
    assert (CONFIGS / "generator" / "nano.yaml").is_file()


@pytest.mark.parametrize("kind", [NestedAutoencoderKL, DiT])
def test_an_unknown_argument_of_the_model_is_refused(kind):
    with pytest.raises(UserError, match=r"model: .*no_such_argument"):
        build_model(kind, {"no_such_argument": 1})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("deepspeed/*.json")), ids=lambda p: p.stem)
def test_every_deepspeed_configuration_is_one_that_the_trainer_runs(path, monkeypatch, tmp_path):
    assert read_deepspeed_config(str(path))["zero_optimization"]["stage"] in (1, 2, 3)
    # By its packaged name it is found from any working folder.
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
def test_a_deepspeed_configuration_that_cannot_be_run_is_refused(tmp_path, text, message):
    path = tmp_path / "zero.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_deepspeed_config(str(path))


def test_a_deepspeed_configuration_that_is_nowhere_is_refused():
    with pytest.raises(UserError, match=r"nowhere\.json is neither a file nor a packaged"):
        read_deepspeed_config("nowhere.json")


def test_a_configuration_changes_what_its_base_says(tmp_path):
    (tmp_path / "base.yaml").write_text("name: a\nschedule: {steps: 10, rates: [1, 2]}\nshares: {8: 0.5}\n")
    (tmp_path / "middle.yaml").write_text("base: base.yaml\nschedule: {steps: 20}\nshares: {16: 0.5}\n")
    (tmp_path / "top.yaml").write_text("base: middle.yaml\nname: b\nschedule: {rates: [3]}\n")
    assert read_yaml(tmp_path / "top.yaml") == {
        "name": "b",
        "schedule": {"steps": 20, "rates": [3]},
        "shares": {8: 0.5, 16: 0.5},
    }


def test_bases_in_a_circle_or_missing_are_refused(tmp_path):
    (tmp_path / "one.yaml").write_text("base: two.yaml\n")
    (tmp_path / "two.yaml").write_text("base: one.yaml\n")
    with pytest.raises(UserError, match=r"one\.yaml: it is its own base, by way of .*two\.yaml"):
        read_yaml(tmp_path / "one.yaml")
    (tmp_path / "three.yaml").write_text("base: four.yaml\n")
    with pytest.raises(UserError, match=r"four\.yaml: no such file"):
        read_yaml(tmp_path / "three.yaml")
