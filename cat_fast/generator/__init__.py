"""DiT over packed sequences: the model, its training loss and its sampler."""

from cat_fast.generator.diffusion import DiffusionLoss, diffusion_loss, make_schedule, paper_schedule
from cat_fast.generator.dit import DiT
from cat_fast.generator.packed_text import PackedText
from cat_fast.generator.sampling import SampleRequest

__all__ = [
    "DiT",
    "DiffusionLoss",
    "PackedText",
    "SampleRequest",
    "diffusion_loss",
    "make_schedule",
    "paper_schedule",
]
