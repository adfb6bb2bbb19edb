"""Training of the generator on packed batches of latents."""
