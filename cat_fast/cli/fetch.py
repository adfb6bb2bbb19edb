"""`cat-fast fetch`: everything a training reads from outside, once, before nodes without network start."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TaskID

from cat_fast import console


def fetch(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="As they are given to the training.")
    ] = None,
    mirror: Annotated[
        str, typer.Option(help="URL of a folder that holds the files, instead of their publishers'.")
    ] = "",
) -> None:
    """Download the pretrained weights that a training needs, and say what has to be placed by hand.

    Files that are there are left alone; a download is checked against its publisher's hash before it takes
    its name. A generator's text encoder comes from the Hugging Face hub into that hub's cache; HF_ENDPOINT
    and HF_HOME say where both are. Training itself never downloads. Exit code 1: something still has to be
    placed by hand.

    Example: **cat-fast fetch configs/tokenizer/cat_c16.yaml**
    """
    from cat_fast.training.config.load import load_run
    from cat_fast.training.pretrained_weights import HubModel, download, required_weights

    by_hand = 0
    needed = required_weights(load_run(str(config), overrides or []))
    for weights in needed:
        if weights.is_there:
            _say("is there", weights.key, str(weights.path))
        elif isinstance(weights, HubModel):
            weights.download()
            _say("fetched", weights.key, str(weights.path))
        elif weights.source is None:
            by_hand += 1
            _say("by hand", weights.key, f"{weights.path} is missing: {weights.by_hand}")
        else:
            with console.progress("bytes") as progress:
                bar = progress.add_task(weights.path.name, total=None)
                download(weights, mirror, partial(_show, progress, bar))
            _say("fetched", weights.key, str(weights.path))
    if not needed:
        console.out.print("this configuration needs no weights from outside")
    if by_hand:
        raise typer.Exit(1)


def _say(state: str, key: str, text: str) -> None:
    console.out.print(f"{state:<9} {key}: {text}", soft_wrap=True, markup=False)


def _show(progress: Progress, bar: TaskID, done: int, total: int) -> None:
    progress.update(bar, completed=done, total=total or None)
