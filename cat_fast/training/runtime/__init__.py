"""Ranks and their collectives, DeepSpeed engines, EMA, seeding."""
