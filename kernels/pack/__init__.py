"""Latents to packed tokens and back in one kernel: `op` is what models call, `reference` the definition."""
