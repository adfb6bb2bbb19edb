"""The dual-token tokenizer: causal semantic codes and codes of a low-resolution guide, as one short sequence.

guide/        image -> grid of codes -> low-resolution image (VQ-VAE with spatially conditioned decoder)
codebook      the vector quantiser
sequence      codes <-> flat integer sequence for language models
tokenizer     `DualTokenizer`: all parts in one folder
"""
