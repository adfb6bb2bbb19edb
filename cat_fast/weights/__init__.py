"""Published checkpoints of other projects: reading their tensors without running their code."""
