"""Training of a linear classification head, on fixed features or together with the encoder."""
