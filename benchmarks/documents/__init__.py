"""Tables of the documents; see `python -m benchmarks.documents --help`."""
