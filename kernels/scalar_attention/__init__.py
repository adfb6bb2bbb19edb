"""Attention with heads of one dimension: `op` is what models call, `reference` the formula."""
