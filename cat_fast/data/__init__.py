"""Images, captions, latent shards, the ratio sampler and loaders that resume exactly where they stopped."""
