"""Loading of a pipeline by a command, without diffusers' progress bar and warnings."""

import os

import torch
from diffusers.utils import logging

from cat_fast.inference.pipeline.cat_pipeline import CATPipeline
from cat_fast.models.load import in_fast_layout


def load_pipeline(
    source: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CATPipeline:
    """Load a pipeline from everything that `CATPipeline.from_pretrained` takes, in one dtype on one device.

    Raises:
        UserError: it cannot be loaded.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        pipeline = CATPipeline.from_pretrained(source).to(device, dtype)
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    in_fast_layout(pipeline.vae)
    return pipeline
