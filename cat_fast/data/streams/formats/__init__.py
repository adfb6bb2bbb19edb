"""Shard formats: tar archives, image files, Hugging Face datasets, and the files next to them."""
