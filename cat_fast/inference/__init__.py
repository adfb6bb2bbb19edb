"""Encoding of photographs to latents, decoding, and `CATPipeline` from labels to images."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cat_fast.inference.pipeline.cat_pipeline import CATOutput, CATPipeline

__all__ = ["CATOutput", "CATPipeline"]


def __getattr__(name: str) -> object:
    # Lazy: importing the pipeline imports diffusers' schedulers, which encoding and decoding do not need.
    if name in __all__:
        from cat_fast.inference.pipeline import cat_pipeline

        return getattr(cat_pipeline, name)
    raise AttributeError(f"module 'cat_fast.inference' has no attribute {name!r}")
