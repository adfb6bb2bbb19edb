"""From a label to a picture."""

from cat_fast.inference.pipeline import CATOutput, CATPipeline

__all__ = ["CATOutput", "CATPipeline"]
