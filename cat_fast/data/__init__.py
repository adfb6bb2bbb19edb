"""Data: images, captions, latent shards, the ratio sampler, and loaders with exact resume."""
