"""Attention with head dimension 1; models call `op`, `reference` is the formula."""
