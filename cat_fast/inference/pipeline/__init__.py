"""`CATPipeline`, and its assembly from trained models."""
