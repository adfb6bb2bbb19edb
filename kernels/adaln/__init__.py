"""Adaptive LayerNorm over packed tokens, one modulation row a sequence: `op` is what models call."""
