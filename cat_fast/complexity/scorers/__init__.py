"""Scorers of descriptions: distilled models, language models, caption length, and escalation between two."""
