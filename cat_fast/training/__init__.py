"""The loop every run shares, its checkpoints and engines, and one task file a model."""
