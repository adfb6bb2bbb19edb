"""Training runs on two ranks that several test files share, started once per session at first use."""

import pytest

from benchmarks.shared.random_latents import write_latents
from tests.training.rank_processes import run_ranks


@pytest.fixture(scope="session")
def gans(tmp_path_factory):
    """Output folder of `gan_worker.py`, with one folder per case."""
    out = tmp_path_factory.mktemp("gans")
    run_ranks("tests.training.tokenizer.gan_worker:main", 2, out)
    return out


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="session")
def generators(latents, tmp_path_factory):
    """Output folder of `generator_worker.py`, with one folder per case."""
    out = tmp_path_factory.mktemp("generators")
    run_ranks("tests.training.generator.generator_worker:main", 2, latents, out)
    return out
