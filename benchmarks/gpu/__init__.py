"""Blocks of `benchmarks.gpu_check`: what is run and measured on a GPU, and at toy sizes on a CPU."""
