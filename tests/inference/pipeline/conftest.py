"""Tiny pipelines with random weights."""

import pytest
import torch

from cat_fast.complexity import Description
from cat_fast.generator import DiT, paper_schedule
from cat_fast.inference import CATPipeline
from cat_fast.tokenizer import NestedAutoencoderKL

LABELS = ["clear blue sky", "village street", "newspaper page"]
DESCRIPTIONS = [
    Description("a clear blue sky"),
    Description("several people walking down a village street past shops and parked bicycles"),
    Description("a newspaper page with columns of text, tables and many photographs", True, True),
]


@pytest.fixture(scope="session")
def parts():
    """Tokenizer and transformer of three classes at 64 px."""
    torch.manual_seed(0)
    tokenizer = NestedAutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_num_layers=1,
        mid_block_attention_head_dim=8,
    )
    transformer = DiT(
        in_channels=4, hidden_size=48, depth=1, num_heads=2, num_classes=3, position_frame=4,
        shift_factor=[0.3, -0.1, 0.0, 0.2], scaling_factor=[0.5, 1.0, 2.0, 0.8],
        tokenizer_fingerprint=tokenizer.fingerprint(),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return tokenizer, transformer


@pytest.fixture
def pipeline(parts):
    made = CATPipeline(
        *parts, paper_schedule(), labels=LABELS, thresholds=(3, 7), resolution=64, descriptions=DESCRIPTIONS
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="session")
def saved(parts, tmp_path_factory):
    """Folder of the pipeline; tests that change files work on a copy."""
    folder = tmp_path_factory.mktemp("saved") / "pipe"
    CATPipeline(
        *parts, paper_schedule(), labels=LABELS, thresholds=(3, 7), resolution=64, descriptions=DESCRIPTIONS
    ).save_pretrained(folder)
    return folder
