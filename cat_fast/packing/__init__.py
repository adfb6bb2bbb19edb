"""Mixed-ratio latents as one run of tokens, and the packer that fills a token budget with them."""

from cat_fast.packing.packed_sequence import PackedSequence
from cat_fast.packing.packer import PackingStatistics, TokenBudgetPacker

__all__ = ["PackedSequence", "PackingStatistics", "TokenBudgetPacker"]
