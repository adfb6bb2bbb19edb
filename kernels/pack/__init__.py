"""Latents to packed tokens and back in one kernel; models call `op`, `reference` is the definition."""
