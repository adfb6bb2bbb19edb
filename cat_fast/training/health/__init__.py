"""Failures of a run: non-finite steps, hangs, stragglers, preemption, and the status that outlives it."""
