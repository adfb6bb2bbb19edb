"""Atomic checkpoints that any number of ranks can load."""
