"""Tiny pipelines for the engine."""

import pytest

from tests.inference.engine.mixes import tiny_pipeline


@pytest.fixture(scope="session")
def pipeline():
    return tiny_pipeline()
