"""An engine's part of a checkpoint, which any number of ranks can load.

Ranks save the pieces of weights and moments that ZeRO gave them. As many ranks read them back as they are;
another number has DeepSpeed join them into its universal form first, beside the checkpoint, and reads its own
pieces from that.
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
"""ZeRO stage -> the stages whose files are alike."""


def save_engine(engine: Any, folder: Path) -> None:
    """Collective. `folder` is this engine's own: a second engine would overwrite the first's files."""
    # Its file `latest` would be written by rank 0 between two collectives, and nobody reads it.
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)


def load_engine(engine: Any, folder: Path, ranks: Ranks) -> None:
    """Collective: go on from `save_engine(…, folder)`, with every weight, moment and count of steps as saved.

    Raises:
        UserError: the checkpoint is of another ZeRO stage.
    """
    saved, wanted = _layout(folder / TAG), _LAYOUTS[engine.zero_optimization_stage()]
    if saved != wanted:
        raise UserError(
            f"{folder}: it was saved under ZeRO stage {saved}, and the key deepspeed names a JSON of stage "
            f"{wanted}: go on with the stage of its run"
        )
    pieces = len(list((folder / TAG).glob(_OPTIMIZER_FILES)))
    if not pieces or pieces == ranks.world_size:
        _load(engine, folder)
        return
    # Within the folder of all checkpoints, which every node sees; the store clears away what a kill leaves.
    joined = folder.parent.parent / f".{folder.parent.name}.{folder.name}.part"
    on_main(lambda: _join(folder / TAG, joined / TAG), ranks)
    engine._config.load_universal_checkpoint = True
    try:
        _load(engine, joined)
    finally:
        engine._config.load_universal_checkpoint = False
    ranks.barrier()
    if ranks.is_main:
        shutil.rmtree(joined, ignore_errors=True)


def _load(engine: Any, folder: Path) -> None:
    path, _ = engine.load_checkpoint(str(folder), tag=TAG)
    if path is None:
        raise UserError(f"{folder}: DeepSpeed finds no state of an engine there")


def _layout(saved: Path) -> str:
    """Which ZeRO stages write such files."""
    if any(saved.glob("zero_pp_rank_*_model_states.pt")):
        return "3"
    return "1 or 2" if any(saved.glob(_OPTIMIZER_FILES)) else "0"


def _join(saved: Path, joined: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(joined.parent, ignore_errors=True)
    arguments = argparse.Namespace(
        input_folder=str(saved),
        output_folder=str(joined),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # Notes for tensor parallelism, which DeepSpeed wants to see although we have none.
        inject_missing_state=True,
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            ds_to_universal.main(arguments)
    except Exception as error:
        last = said.getvalue().strip().rpartition("\n")[2]
        raise as_write_error(error, joined, "the checkpoint for another number of ranks") or UserError(
            f"{saved}: the pieces of its ranks cannot be joined for another number of ranks "
            f"({type(error).__name__}: {error}{'; ' if last else ''}{last})"
        ) from error
