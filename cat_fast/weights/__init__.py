"""Checked loading of model folders, and safe loading of checkpoints published by other projects."""
