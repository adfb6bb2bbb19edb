"""Loading of a pipeline by a command, without diffusers' progress bar and warnings."""

import os

import torch
from diffusers.utils import logging

from cat_fast.inference.pipeline.cat_pipeline import CATPipeline


def load_pipeline(source: str | os.PathLike[str], device: torch.device | str = "cpu") -> CATPipeline:
    """Load a pipeline from everything that `CATPipeline.from_pretrained` takes.

    Raises:
        UserError: it cannot be loaded.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return CATPipeline.from_pretrained(source).to(device)
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
