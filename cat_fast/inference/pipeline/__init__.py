"""`CATPipeline`, its saved layout and its assembly from trained models."""
