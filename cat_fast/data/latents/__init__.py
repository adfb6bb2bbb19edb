"""Latent folders: shard format, writer and data set."""
