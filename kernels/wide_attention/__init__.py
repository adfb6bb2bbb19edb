"""Attention with the wide heads of a VAE's middle block; models call `op`, `reference` is the formula."""
