"""Configuration of a training run: dataclasses for the YAML file, and DeepSpeed's JSON files."""
