"""`cat-fast fetch`: download the pretrained weights of a training run, for nodes without network access."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TaskID

from cat_fast import console


def fetch(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="key=value", help="Configuration overrides, the same as for training."),
    ] = None,
    mirror: Annotated[
        str, typer.Option(help="URL of a folder with the files, used instead of the publishers' URLs.")
    ] = "",
) -> None:
    """Download the pretrained weights that a training run needs, and list those to be placed manually.

    Existing files are kept. Each download is verified against the publisher's hash. A generator's text
    encoder is downloaded from the Hugging Face hub into its local cache; HF_ENDPOINT and HF_HOME set the
    server and the cache folder. Training itself never downloads. Exit code 1: some weights must be placed
    manually.

    Example: **cat-fast fetch configs/tokenizer/cat_c16.yaml**
    """
    from cat_fast.training.config.load import load_run
    from cat_fast.training.pretrained_weights import HubModel, download, required_weights

    num_manual = 0
    needed = required_weights(load_run(str(config), overrides or []))
    for weights in needed:
        if weights.is_available:
            _report("found", weights.key, str(weights.path))
        elif isinstance(weights, HubModel):
            weights.download()
            _report("fetched", weights.key, str(weights.path))
        elif weights.source is None:
            num_manual += 1
            _report("manual", weights.key, f"{weights.path} is missing: {weights.by_hand}")
        else:
            with console.progress("bytes") as progress:
                bar = progress.add_task(weights.path.name, total=None)
                download(weights, mirror, partial(_show, progress, bar))
            _report("fetched", weights.key, str(weights.path))
    if not needed:
        console.out.print("this configuration needs no pretrained weights")
    if num_manual:
        raise typer.Exit(1)


def _report(state: str, key: str, text: str) -> None:
    console.out.print(f"{state:<9} {key}: {text}", soft_wrap=True, markup=False)


def _show(progress: Progress, bar: TaskID, done: int, total: int) -> None:
    progress.update(bar, completed=done, total=total or None)
