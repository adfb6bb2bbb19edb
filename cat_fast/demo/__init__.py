"""Demos with a report: the shipped models, and training on the packaged photographs."""

from cat_fast.demo.run import DemoSettings, run_demo
from cat_fast.demo.shipped import run_shipped_demo

__all__ = ["DemoSettings", "run_demo", "run_shipped_demo"]
