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

from cat_fast.errors import UserError
from cat_fast.training.checkpoints.write_errors import as_write_error
from cat_fast.training.runtime.collective_errors import on_main
from cat_fast.training.runtime.ranks import Ranks

TAG = "state"
_OPTIMIZER_FILES = "zero_pp_rank_*_optim_states.pt"
_LAYOUTS = {0: "0", 1: "1 or 2", 2: "1 or 2", 3: "3"}
"""ZeRO stage -> name of its file layout; stages 1 and 2 share one."""


def save_engine(engine: Any, folder: Path) -> None:
    """Save an engine's weights, moments and step count to a folder that no other engine uses.

    Collective: every rank must call it.
    """
    # Rank 0 would write DeepSpeed's file `latest` between two collectives, and it is never read.
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)


def load_engine(engine: Any, folder: Path, ranks: Ranks) -> None:
    """Restore the weights, moments and step counts of `save_engine(…, folder)`.

    Collective: every rank must call it.

    Raises:
        UserError: the checkpoint was saved under an incompatible ZeRO stage.
    """
    saved, expected = _layout(folder / TAG), _LAYOUTS[engine.zero_optimization_stage()]
    if saved != expected:
        raise UserError(
            f"{folder}: saved under ZeRO stage {saved}, but the key deepspeed names a JSON of stage "
            f"{expected}: resume with stage {saved}"
        )
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


def _load(engine: Any, folder: Path) -> None:
    path, _ = engine.load_checkpoint(str(folder), tag=TAG)
    if path is None:
        raise UserError(f"{folder}: DeepSpeed found no engine state there")


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
