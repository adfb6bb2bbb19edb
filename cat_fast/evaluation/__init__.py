"""Metrics, and one file a question."""
