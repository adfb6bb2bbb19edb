"""Attention over packed sequences: `op` is what models call, `reference` the formula."""
