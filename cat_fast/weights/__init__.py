"""Safe loading of checkpoints published by other projects."""
