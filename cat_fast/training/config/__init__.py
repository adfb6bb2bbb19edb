"""Configuration of a training run: the sections of its YAML file, and DeepSpeed's JSON files."""
