"""The fast distilled scorer: a small network over word vectors, run in NumPy without torch."""
