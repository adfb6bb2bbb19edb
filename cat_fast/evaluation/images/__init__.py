"""Sets of images to evaluate, references, and their features."""
