"""Shared by the benchmarks: harness, command line, machine, baselines and batches."""
