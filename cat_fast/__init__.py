"""cat_fast: content-adaptive image tokenization.

Public names are loaded on first use, so that importing the package or printing command-line help does not
import torch.
"""

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cat_fast.complexity import Description, RatioThresholds
    from cat_fast.errors import UserError
    from cat_fast.generator import DiT
    from cat_fast.inference import CATPipeline
    from cat_fast.packing import PackedSequence, TokenBudgetPacker
    from cat_fast.tokenizer import NestedAutoencoderKL

__version__ = "0.1.0"

# Without a GPU build, every import of xformers logs six lines; `cat-fast info` reports the same.
logging.getLogger("xformers").setLevel(logging.ERROR)

_MODULES = {
    "CATPipeline": "cat_fast.inference",
    "Description": "cat_fast.complexity",
    "DiT": "cat_fast.generator",
    "NestedAutoencoderKL": "cat_fast.tokenizer",
    "PackedSequence": "cat_fast.packing",
    "RatioThresholds": "cat_fast.complexity",
    "TokenBudgetPacker": "cat_fast.packing",
    "UserError": "cat_fast.errors",
}

__all__ = [
    "CATPipeline",
    "Description",
    "DiT",
    "NestedAutoencoderKL",
    "PackedSequence",
    "RatioThresholds",
    "TokenBudgetPacker",
    "UserError",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'cat_fast' has no attribute {name!r}")
