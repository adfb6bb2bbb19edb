"""Reconstruction quality of tokenizers and baselines on one set of images."""
