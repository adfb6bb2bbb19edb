"""Training of the diffusion transformer on packed batches of latents."""
