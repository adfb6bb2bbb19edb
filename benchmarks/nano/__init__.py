"""Comparisons of the nano models, for `benchmarks.nano_report`."""
