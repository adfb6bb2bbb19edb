"""Scorers of images: captioners with a scorer of descriptions, and signals of the pixels."""
