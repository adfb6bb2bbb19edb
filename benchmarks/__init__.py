"""Benchmarks: one script a question, all on `harness`. Run `python benchmarks/NAME.py --help`."""
