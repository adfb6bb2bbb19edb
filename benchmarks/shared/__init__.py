"""What the benchmarks share: harness, command line, machine, baselines, and the batches they measure."""
