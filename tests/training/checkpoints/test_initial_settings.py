"""Settings that a resumed tokenizer run cannot change; `test_task` has those of the generator's."""

import json
from types import SimpleNamespace

import pytest
import torch

from cat_fast.config import fill, read_yaml
from cat_fast.errors import UserError
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.training.config.dual_token import GuideRun
from cat_fast.training.config.settings import TokenizerRun
from cat_fast.training.dual_token.guide_task import GuideTask
from cat_fast.training.tokenizer.task import TokenizerTask
from cat_fast.training.tokenizer.trainer import TokenizerTrainer
from tests.cli.conftest import tiny_tokenizer
from tests.training.runs import ROOT, TOKENIZER


def trainer(**changes: object) -> TokenizerTrainer:
    trainer = TokenizerTrainer.__new__(TokenizerTrainer)  # without engines: settings are compared first
    trainer.model = tiny_tokenizer(**changes)
    return trainer


@pytest.fixture(scope="module")
def state():
    return json.loads(json.dumps({"began_with": trainer()._initial_settings(), "lecam": {}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # weights of the same shapes, with another function
        ({"norm_num_groups": 2}, r"^model\.norm_num_groups: expected 4, as at the start of the run, got 2"),
        ({"mid_block_attention_head_dim": 8}, r"^model\.mid_block_attention_head_dim: expected 1, .* got 8"),
        ({"ratios": (8, 16)}, r"^model\.ratios: expected \[8, 16, 32\], .* got \[8, 16\]"),
        # weights of other shapes
        ({"latent_channels": 8}, r"^model\.latent_channels: expected 4, .* got 8"),
        ({"attention_levels": (2,)}, r"^model\.attention_levels: expected \[\], .* got \[2\]"),
    ],
)
def test_a_changed_autoencoder_is_refused_on_resume_in_one_line(state, tmp_path, changes, message):
    with pytest.raises(UserError, match=f"{message}: restore the setting, or start a new run") as error:
        trainer(**changes).load(tmp_path, state)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes", [{}, {"sample_size": 128}, {"default_ratio": 32}, {"layers_per_block": 1}]
)
def test_settings_without_effect_on_the_weights_may_change(state, tmp_path, changes):
    with pytest.raises(AttributeError, match="engine"):  # the next step of loading
        trainer(**changes).load(tmp_path, state)


def test_entries_that_are_not_compared_do_not_change_reconstructions(state):
    weights = tiny_tokenizer().state_dict()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = tiny_tokenizer()(image, ratio=16).sample
    other = {"sample_size": 128, "default_ratio": 8, "scaling_factor": 2.0, "shift_factor": 1.0}
    other |= {
        "latents_of": "a" * 16,
        "force_upcast": False,
        "latents_mean": (1.0,) * 4,
        "latents_std": (2.0,) * 4,
    }
    model = NestedAutoencoderKL(**{**tiny_tokenizer().config, **other}).eval()
    model.load_state_dict(weights)
    assert torch.equal(model(image, ratio=16).sample, expected)
    compared = {name.removeprefix("model.") for name in state["began_with"]}
    entries = {name for name in model.config if not name.startswith("_")}
    assert compared == entries - other.keys()


def test_another_seed_which_reads_other_images_is_refused_on_resume(tmp_path):
    def task(*overrides: str) -> TokenizerTask:
        task = TokenizerTask.__new__(TokenizerTask)  # without engines: settings are compared first
        path, *tiny = TOKENIZER
        task.config = fill(TokenizerRun, read_yaml(ROOT / path), [*tiny, "output_dir=unused", *overrides])
        task.initial_weights = None
        return task

    saved = {"held_out": None, **task()._initial_settings()}
    (tmp_path / "task.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"^seed: expected 0, as at the start of the run, got 1"):
        task("seed=1").load(tmp_path)
    (tmp_path / "task.json").write_text('{"held_out": null}')  # of an earlier version
    with pytest.raises(AttributeError, match="trainer"):  # the next step of loading
        task("seed=1").load(tmp_path)


def test_another_seed_of_a_guide_is_refused_on_resume():
    task = GuideTask.__new__(GuideTask)
    task.config, task.grids, task.initial_weights = (
        GuideRun(task="dual_guide", output_dir="o"),
        [(8, 8)],
        None,
    )
    task.model = SimpleNamespace(config={})
    assert task.initial_settings()["seed"] == 0
