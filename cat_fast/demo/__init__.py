"""End-to-end demo on the packaged photographs: train a tokenizer and a generator, reconstruct, sample, report."""

from cat_fast.demo.run import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
