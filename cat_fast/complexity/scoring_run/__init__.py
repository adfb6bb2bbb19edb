"""Scoring of captions in files of any size: input, resumable work, output, and the cost of it."""
