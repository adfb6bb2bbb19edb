"""The main job in one go: photographs in, a trained tokenizer and generator, and images out."""

from cat_fast.demo.run import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
