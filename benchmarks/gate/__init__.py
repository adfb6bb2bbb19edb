"""Gate on figures that do not depend on the machine, compared with `benchmarks/expected.json`."""
