"""Adaptive LayerNorm over packed tokens with one modulation row per sequence; models call `op`."""
