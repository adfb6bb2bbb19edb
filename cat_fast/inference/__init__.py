"""Trained models at work: photographs to latents and back, packed-sequence generation."""
