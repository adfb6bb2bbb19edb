"""The guide: a VQ-VAE that reconstructs an image at low resolution (branch I of the paper, section 3.1)."""
