"""Packed sequences of mixed-ratio latents, and the packer that fills token budgets with them."""

from cat_fast.packing.packed_sequence import PackedSequence
from cat_fast.packing.packer import PackingStatistics, TokenBudgetPacker

__all__ = ["PackedSequence", "PackingStatistics", "TokenBudgetPacker"]
