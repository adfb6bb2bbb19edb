"""Benchmarks: one script per question, all on `shared.harness`; `python -m benchmarks.NAME` at the root."""
