"""Weights of a published BLIP-2 for the ViT and the causal Q-Former of a `SemanticModel`."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, Blip2QFormerModel, Blip2VisionModel

from cat_fast.dual_token.semantic.model import SemanticModel
from cat_fast.errors import UserError, first_line
from cat_fast.generator.text_models import find_text_model

QUERIES = "query_tokens"


def blip2_settings(name: str) -> dict[str, Any]:
    """Return the `vision`, `qformer` and `num_queries` settings of a published BLIP-2.

    Args:
        name: folder, or name on the Hugging Face hub whose files are in its cache.

    Raises:
        UserError: it is missing, or of another class.
    """
    config = _config(_folder(name), name)
    return {
        "vision": _own(config.vision_config),
        "qformer": _own(config.qformer_config),
        "num_queries": config.num_query_tokens,
    }


def load_blip2(model: SemanticModel, name: str) -> None:
    """Copy the ViT, the Q-Former and its queries of a published BLIP-2 into a model of its settings.

    The language model of the published folder is not read.

    Raises:
        UserError: the folder is missing, of another class, or its weights do not fit.
    """
    folder = _folder(name)
    config = _config(folder, name)
    try:
        vision = _load(Blip2VisionModel, folder, config.vision_config, "vision_model")
        qformer = _load(Blip2QFormerModel, folder, config.qformer_config, "qformer")
        queries = _read_queries(folder)
        model.vision_model.load_state_dict(vision)
        model.causal.qformer.load_state_dict(qformer)
        with torch.no_grad():
            model.causal.query_tokens.copy_(queries)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{name}: the weights of BLIP-2 cannot be used ({first_line(error)})") from error


def _folder(name: str) -> Path:
    folder = find_text_model(name)
    if folder is None:
        raise UserError(
            f"BLIP-2 {name!r}: not on this machine; give a folder, or download it with `hf download {name}`"
        )
    return folder


def _config(folder: Path, name: str) -> Any:
    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: not a model folder ({first_line(error)})") from error
    if config.model_type != "blip-2":
        raise UserError(f"{name}: expected a BLIP-2, got a model of type {config.model_type}")
    return config


def _own(config: Any) -> dict[str, Any]:
    """Return the entries of a config that differ from its class's defaults."""
    left_out = ("transformers_version", "torch_dtype", "dtype", "model_type", "architectures")
    return {key: value for key, value in config.to_diff_dict().items() if key not in left_out}


def _load(kind: Any, folder: Path, config: Any, part: str) -> dict[str, torch.Tensor]:
    """Return the state of one part, read by names, so that the language model's weights stay on disk."""
    own = kind(config).state_dict()
    found = _tensors(folder, [f"{part}.{name}" for name in own])
    return {name.removeprefix(f"{part}."): value.float() for name, value in found.items()}


def _read_queries(folder: Path) -> torch.Tensor:
    return _tensors(folder, [QUERIES])[QUERIES].float()


def _tensors(folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """Read tensors by name from the safetensors files of a folder.

    Raises:
        KeyError: one is missing.
    """
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    wanted = set(names)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 # not a dictionary
                name = key.removeprefix("model.")
                if name in wanted:
                    found[name] = file.get_tensor(key)
    if missing := sorted(wanted - found.keys()):
        raise KeyError(f"{missing[0]} is missing from the .safetensors files")
    return found
