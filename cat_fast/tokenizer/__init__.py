"""The nested VAE with its losses and discriminator."""

from cat_fast.tokenizer.autoencoder import NestedAutoencoderKL

__all__ = ["NestedAutoencoderKL"]
