"""Folders of latents: the format of their shards, and the data set read from them."""
