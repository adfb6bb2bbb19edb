"""Classification on latents: labelled arrays, encoders and baselines, accuracy with intervals."""
