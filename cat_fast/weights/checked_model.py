"""Base class of the models: diffusers' `from_pretrained`, with errors in place of its warnings."""

import contextlib
import difflib
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from cat_fast.errors import UserError
from cat_fast.weights.published import check_keys
from cat_fast.weights.weight_files import WeightFiles

DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
"""Options of diffusers' `from_pretrained` that concern downloads and have no effect on local files."""
FILE_OPTIONS = (*DOWNLOAD_OPTIONS, "dtype", "torch_dtype")
"""Options of functions that load a single file, besides config entries."""
LOADING_OPTIONS = (
    *DOWNLOAD_OPTIONS,
    "device_map",
    "disable_mmap",
    "dtype",
    "flashpack_kwargs",
    "ignore_mismatched_sizes",
    "low_cpu_mem_usage",
    "max_memory",
    "mirror",
    "offload_folder",
    "offload_state_dict",
    "output_loading_info",
    "parallel_config",
    "quantization_config",
    "subfolder",
    "torch_dtype",
    "use_flashpack",
    "use_safetensors",
    "variant",
)
"""Options of diffusers' `ModelMixin.from_pretrained`."""

_EMA_ENTRIES = (
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)
"""Entries that diffusers' `EMAModel.save_pretrained` adds to a config."""
_LOGGER = logging.getLogger("diffusers.models.modeling_utils")
_NO_FLOAT32_MODULES = "should be kept in float32: []"
HANDLED = (
    "Some weights of",
    "An error occurred while trying to fetch",
    "Defaulting to unsafe serialization",
)
"""Texts of diffusers' log records of missing or unexpected weights and files, which raise errors here."""


class CheckedModel(WeightFiles, ModelMixin, ConfigMixin):  # type: ignore[misc]  # both define config_name
    """Model of diffusers that is never loaded from another class's folder or from incomplete weights."""

    _converted_classes: ClassVar[tuple[type, ...]] = ()
    """Other classes whose folders a subclass converts."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **options: Any
    ) -> Self:
        """Load a model in evaluation mode from a folder or a name on the Hugging Face hub.

        Args:
            options: those of diffusers' `from_pretrained`, and config entries to override. With
                `output_loading_info`, missing and unexpected weights are returned instead of raised.

        Raises:
            UserError: an unknown option, a folder of another class, an unknown config entry, or weights that
                do not match the model's.
            OSError: missing or damaged files, as in diffusers.
        """
        name = str(pretrained_model_name_or_path)
        entries = init_arguments(cls)
        check_options(f"{cls.__name__}.from_pretrained", options, {*entries, *LOADING_OPTIONS})
        config = cls.read_config(name, options)
        known = {*entries, *_EMA_ENTRIES, "quantization_config"}
        if unknown := {entry for entry in config if not entry.startswith("_")} - known:
            raise UserError(
                f"{name}: config.json has the unknown entry {min(unknown)!r}{_hint(min(unknown), entries)}; "
                f"expected the config of a {cls.__name__} of this version"
            )
        if options.pop("output_loading_info", False):
            return super().from_pretrained(name, output_loading_info=True, **options)
        with without_warnings(*HANDLED):
            loaded: Any = super().from_pretrained(name, output_loading_info=True, **options)
        model, info = loaded
        unexpected = () if getattr(model, "is_quantized", False) else info.get("unexpected_keys", ())
        check_keys(
            name, missing={*info.get("missing_keys", ()), *_unread(model, options)}, unexpected=unexpected
        )
        return model

    @classmethod
    def read_config(cls, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config of a folder or hub name, whose class `from_pretrained` can load.

        Raises:
            UserError: a single file, or the config of another class.
            OSError: the config is missing or not valid JSON, as in diffusers.
        """
        if Path(name).is_file():
            raise UserError(f"{name}: expected a folder with a config.json, got a file")
        where = {key: options[key] for key in (*DOWNLOAD_OPTIONS, "subfolder") if key in options}
        config: Any = cls.load_config(name, **where)
        found = config.get("_class_name") if isinstance(config, dict) else None
        own = [kind for kind in cls.__mro__ if issubclass(kind, CheckedModel) and kind is not CheckedModel]
        names = [kind.__name__ for kind in (*own, *cls._converted_classes)]
        if found not in names:
            raise UserError(
                f"{name}: expected the config.json of a {' or '.join(names)}, got that of "
                f"{'no class' if found is None else found}"
            )
        return config

    def register_integers(self, **values: Any) -> None:
        """Set config entries to their values as ints where JSON cannot hold those that were passed."""
        for name, value in values.items():
            try:
                json.dumps(self.config[name])
            except TypeError:
                self.register_to_config(**{name: value})

    def to(self, *arguments: Any, **options: Any) -> Self:  # type: ignore[override] # torch's overloads
        """Move or cast the model, as `torch.nn.Module.to`."""
        with without_warnings(_NO_FLOAT32_MODULES):  # diffusers warns even if there are no such modules
            return super().to(*arguments, **options)


def init_arguments(kind: Any) -> set[str]:
    """Return the names of a model's constructor arguments, which are its config entries."""
    return set(kind._get_init_keys(kind)) - {"self", "kwargs"}


def check_options(function: str, options: Mapping[str, Any], known: Collection[str]) -> None:
    """Check the options of a loading function.

    Args:
        function: its name, for error messages.
        known: options and config entries that it accepts.

    Raises:
        UserError: an unknown option, or a dtype that is not a `torch.dtype`.
    """
    for name, value in options.items():
        if name not in known:
            raise UserError(
                f"{function}: unexpected argument {name!r}{_hint(name, known)}, expected one of "
                f"{', '.join(sorted(known))}"
            )
        if name in ("dtype", "torch_dtype") and not isinstance(value, torch.dtype | None):
            raise UserError(f"{function}: {name}: expected a dtype such as torch.float16, got {value!r}")


def pop_dtype(options: dict[str, Any]) -> torch.dtype | None:
    """Remove `dtype` and `torch_dtype` from options and return the one that is set."""
    old, new = options.pop("torch_dtype", None), options.pop("dtype", None)
    return old if new is None else new


def _unread(model: torch.nn.Module, options: Mapping[str, Any]) -> list[str]:
    """Return the weights that an index lists and no shard contains: diffusers leaves them on meta."""
    if options.get("device_map") is not None:
        return []  # offloaded weights are there, too
    return [name for name, tensor in model.state_dict().items() if tensor.is_meta]


def _hint(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


@contextlib.contextmanager
def without_warnings(*texts: str) -> Iterator[None]:
    """Drop diffusers' log records that contain one of `texts`."""

    def keep(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in texts)

    _LOGGER.addFilter(keep)
    try:
        yield
    finally:
        _LOGGER.removeFilter(keep)
