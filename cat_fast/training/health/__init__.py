"""Health of a run: non-finite steps, hangs, stragglers, preemption, and its status file."""
