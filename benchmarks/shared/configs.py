"""Runs of the configurations that ship in `configs`."""

from collections.abc import Sequence
from pathlib import Path

from cat_fast.training.config.load import load_run
from cat_fast.training.config.settings import GeneratorRun, TokenizerRun

CONFIGS = Path(__file__).parents[2] / "configs"


def tokenizer_run(name: str, overrides: Sequence[str] = ()) -> TokenizerRun:
    """Return the run of configs/tokenizer/NAME.yaml, with `key=value` overrides."""
    run = load_run(str(CONFIGS / f"tokenizer/{name}.yaml"), list(overrides))
    assert isinstance(run, TokenizerRun)
    return run


def generator_run(name: str, overrides: Sequence[str] = ()) -> GeneratorRun:
    """Return the run of configs/generator/NAME.yaml, with `key=value` overrides."""
    run = load_run(str(CONFIGS / f"generator/{name}.yaml"), list(overrides))
    assert isinstance(run, GeneratorRun)
    return run
