"""Distillation of the image student from ratings and scores of descriptions."""
