"""Schedules of serving: the engine, three baselines, their tuning and the goals."""
