"""Metrics, and one file per evaluation."""
