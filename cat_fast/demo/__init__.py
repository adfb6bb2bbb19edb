"""End-to-end demo: train a tokenizer and a generator on the packaged photographs, and report on them."""

from cat_fast.demo.run import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
