"""Metrics of a run: logs, trackers, throughput, FLOPs, reconstruction grids."""
