"""Nested VAE: configuration, blocks, autoencoder, objective and discriminator."""

from cat_fast.tokenizer.autoencoder import NestedAutoencoderKL

__all__ = ["NestedAutoencoderKL"]
