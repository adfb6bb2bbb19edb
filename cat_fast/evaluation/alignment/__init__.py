"""Agreement of images with their captions, by published preference models."""
