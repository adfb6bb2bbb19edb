"""Building models from configurations, loading them from folders, and choosing their device."""
