"""Attention with wide heads, of a VAE's middle block: `op` is what models call, `reference` the formula."""
