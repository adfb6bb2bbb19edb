"""The `accurate` tier of the distilled scorer: an adapted sentence encoder and a kernel regression on it."""
