"""Models small enough to run in milliseconds."""

import pytest
import torch

from cat_fast.dual_token.guide.model import GuideModel
from cat_fast.dual_token.tokenizer import DualTokenizer

TINY_GUIDE = {
    "block_out_channels": [4, 8, 8, 8],
    "decoder_out_channels": [8, 8],
    "layers_per_block": 1,
    "attention_levels": [],
    "mid_block_attention_head_dim": 8,
    "norm_num_groups": 2,
    "code_channels": 4,
    "codebook_size": 16,
}
"""Stride 8, scale 2."""


def tiny_guide(seed: int = 0, **changes) -> GuideModel:
    torch.manual_seed(seed)
    return GuideModel(**(TINY_GUIDE | changes)).eval()


@pytest.fixture
def tokenizer():
    return DualTokenizer(tiny_guide(), max_side=8)
