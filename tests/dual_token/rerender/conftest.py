"""Tiny diffusion models on disk: a Stable Diffusion folder, and pipelines of this package."""

import pytest

from benchmarks.shared.inversion_round_trip import save_tiny_stable_diffusion
from cat_fast.generator.diffusion import make_schedule
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.inference import CATPipeline
from tests.inference.pipeline.test_text_pipeline import make_parts
from tests.inference.tiny_encoder import save_encoder


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory):
    """Folder of a `StableDiffusionPipeline` with random weights, at 16 px."""
    return save_tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def cat_pipelines(tmp_path_factory):
    """Folders of text-conditional pipelines at 64 px: one that predicts noise, and a flow."""
    encoder = TextEncoder(save_encoder(tmp_path_factory.mktemp("encoder")))
    folders = {}
    for kind, changes in (("epsilon", {}), ("flow", {"noise_shift_tokens": 4.0, "pooled_text": True})):
        tokenizer, transformer, schedule = make_parts(**changes)
        pipeline = CATPipeline(
            tokenizer, transformer, make_schedule("flow") if kind == "flow" else schedule, encoder,
            labels=["a", "b"], resolution=64,
        )  # fmt: skip
        folders[kind] = tmp_path_factory.mktemp(kind) / "pipe"
        pipeline.save_pretrained(folders[kind])
    return folders
