"""Photographs to latents and back: as one file, or as shards for training a generator."""
