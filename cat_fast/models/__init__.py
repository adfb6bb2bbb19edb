"""Building and loading models: from a configuration, from a folder; and the device they run on."""
