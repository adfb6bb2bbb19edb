"""Trainings on two ranks that several files look at: launched once a session, when first asked for."""

import pytest

from tests.training.rank_processes import run_ranks
from tests.training.runs import write_latents


@pytest.fixture(scope="session")
def gans(tmp_path_factory):
    """The folder in which `gan_worker.py` left a folder a case."""
    out = tmp_path_factory.mktemp("gans")
    run_ranks("tests.training.tokenizer.gan_worker:main", 2, out)
    return out


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="session")
def generators(latents, tmp_path_factory):
    """The folder in which `generator_worker.py` left a folder a case."""
    out = tmp_path_factory.mktemp("generators")
    run_ranks("tests.training.generator.generator_worker:main", 2, latents, out)
    return out
