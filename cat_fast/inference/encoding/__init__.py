"""Encoding of images to latents and decoding: a single latent file, or latent shards for training a DiT."""
