"""State of one DeepSpeed engine in a checkpoint, which any number of ranks can load.

Each rank saves its ZeRO partition of weights and moments. The same number of ranks reads the partitions back
directly. For another number, DeepSpeed first converts them to its universal format in a temporary folder.
"""

import argparse
import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cat_fast.errors import UserError
from cat_fast.training.checkpoints.write_errors import as_write_error
from cat_fast.training.runtime.collective_errors import on_main
from cat_fast.training.runtime.ranks import Ranks

TAG = "state"
_OPTIMIZER_FILES = "zero_pp_rank_*_optim_states.pt"
_MODEL_FILES = "*mp_rank_00_model_states.pt"
_LAYOUTS = {0: "0", 1: "1 or 2", 2: "1 or 2", 3: "3"}
"""ZeRO stage -> name of its file layout; stages 1 and 2 share one."""


def save_engine(engine: Any, folder: Path) -> None:
    """Save an engine's weights, moments and step count to a folder that no other engine uses.

    Collective: every rank must call it.
    """
    # Rank 0 would write DeepSpeed's file `latest` between two collectives, and it is never read.
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)


def load_engine(engine: Any, folder: Path, ranks: Ranks, section: str) -> None:
    """Restore the weights, moments and step counts of `save_engine(…, folder)`.

    Collective: every rank must call it.

    Args:
        section: section of the configuration that determines the module's sizes, for messages.

    Raises:
        UserError: the checkpoint was saved under an incompatible ZeRO stage, or has weights of other sizes;
            nothing was loaded.
    """
    saved, expected = _layout(folder / TAG), _LAYOUTS[engine.zero_optimization_stage()]
    if saved != expected:
        raise UserError(
            f"{folder}: saved under ZeRO stage {saved}, but the key deepspeed names a JSON of stage "
            f"{expected}: resume with stage {saved}"
        )
    on_main(lambda: _require_same_shapes(engine, folder / TAG, section), ranks)
    partitions = len(list((folder / TAG).glob(_OPTIMIZER_FILES)))
    if not partitions or partitions == ranks.world_size:
        _load(engine, folder)
        return
    # In the folder of all checkpoints, which every node sees; the store deletes it after a killed run.
    universal = folder.parent.parent / f".{folder.parent.name}.{folder.name}.part"
    on_main(lambda: _convert_to_universal(folder / TAG, universal / TAG), ranks)
    engine._config.load_universal_checkpoint = True
    try:
        _load(engine, universal)
    finally:
        engine._config.load_universal_checkpoint = False
    ranks.barrier()
    if ranks.is_main:
        shutil.rmtree(universal, ignore_errors=True)


def saved_bytes(engine: Any) -> int:
    """Return about the size of `save_engine` over all ranks, once the optimizer has a state."""
    # Adam's two moments and the fp32 weights; ZeRO 1 and 2 save the module's weights as well.
    copies = 4 if engine.zero_optimization_stage() in (1, 2) else 3
    return 4 * copies * parameter_count(engine.module)


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters of a module, which ZeRO 3 may have partitioned."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def _load(engine: Any, folder: Path) -> None:
    path, _ = engine.load_checkpoint(str(folder), tag=TAG)
    if path is None:
        raise UserError(f"{folder}: DeepSpeed found no engine state there")


def _require_same_shapes(engine: Any, saved: Path, section: str) -> None:
    """Check that a saved engine's trained weights have the names and shapes of this one's."""
    now = {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    # DeepSpeed records the shapes of other weights under some stages only.
    others = dict(engine.module.named_buffers()) | dict(engine.module.named_parameters())
    before = {
        name: shape for name, shape in _saved_shapes(saved).items() if name in now or name not in others
    }
    different = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    if different:
        name = different[0]
        raise UserError(
            f"{saved.parent}: this run's model has other sizes, {name} has {_format_shape(now.get(name))}, "
            f"but {_format_shape(before.get(name))} in the checkpoint: restore the sizes under {section} "
            "that the run started with, or start a new run in another output_dir"
        )


def _saved_shapes(saved: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a saved engine's weights by name, without reading the values."""
    file = min(saved.glob(_MODEL_FILES))
    state = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    groups = state.get("param_shapes")  # full shapes under ZeRO; stage 0 saves the weights only
    if groups is None:
        return {name: tuple(value.shape) for name, value in state["module"].items()}
    return {name: tuple(shape) for group in groups for name, shape in group.items()}


def _format_shape(shape: tuple[int, ...] | None) -> str:
    return "no such weight" if shape is None else f"shape {shape}"


def _layout(saved: Path) -> str:
    """Return the file layout of a saved engine, as in `_LAYOUTS`."""
    if any(saved.glob("zero_pp_rank_*_model_states.pt")):
        return "3"
    return "1 or 2" if any(saved.glob(_OPTIMIZER_FILES)) else "0"


def _convert_to_universal(saved: Path, universal: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(universal.parent, ignore_errors=True)
    arguments = argparse.Namespace(
        input_folder=str(saved),
        output_folder=str(universal),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # Metadata for tensor parallelism, which DeepSpeed requires even without it.
        inject_missing_state=True,
    )
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            ds_to_universal.main(arguments)
    except Exception as error:
        last = output.getvalue().strip().rpartition("\n")[2]
        raise as_write_error(error, universal, "the checkpoint for another number of ranks") or UserError(
            f"{saved}: cannot be converted for another number of ranks "
            f"({type(error).__name__}: {error}{'; ' if last else ''}{last})"
        ) from error
