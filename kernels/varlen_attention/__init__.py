"""Attention over packed sequences; models call `op`, `reference` is the formula."""
