"""Shard formats: tar archives with sidecars, image files, Hugging Face datasets."""
