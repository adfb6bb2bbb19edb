"""Opening a back end by the name or folder of its diffusion model."""

import json
from pathlib import Path

import torch

from cat_fast.dual_token.rerender.backend import Backend
from cat_fast.errors import UserError, first_line
from cat_fast.models.device import find_device
from cat_fast.weights.shipped import shipped_folder


def open_backend(
    name: str,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    *,
    ratio: int | None = None,
    num_states: int = 77,
) -> Backend:
    """Return the back end of a diffusion model.

    Args:
        name: a pipeline of this package (a folder, or `nano`), or a Stable Diffusion folder.
        dtype: of the diffusion model; autoencoders of Stable Diffusion stay in fp32.
        ratio: compression ratio, for pipelines of this package.
        num_states: maximum number of text states, for the same.

    Raises:
        UserError: the model is missing, damaged, or of another class, or the device is not available.
    """
    target = find_device(device)
    folder = shipped_folder(name) or Path(name)
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"{name}: expected a pipeline of this package, such as nano, or a Stable Diffusion folder; "
            f"{'model_index.json is missing' if folder.is_dir() else 'no such folder'}"
        )
    try:
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: not the index of a pipeline ({first_line(error)})") from error
    if kind == "CATPipeline":
        from cat_fast.dual_token.rerender.cat_pipeline import CATBackend
        from cat_fast.inference.pipeline.loading import load_pipeline

        return CATBackend(load_pipeline(name, target, dtype), name, ratio, num_states)
    if kind == "StableDiffusionPipeline":
        from cat_fast.dual_token.rerender.stable_diffusion import StableDiffusionBackend

        if ratio is not None:
            raise UserError("ratio: applies to pipelines of this package only; leave it out")
        return StableDiffusionBackend(folder, target, dtype)
    raise UserError(f"{name}: expected a CATPipeline or a StableDiffusionPipeline, got a {kind}")
