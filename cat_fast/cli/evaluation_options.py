"""Options that several commands of `cat-fast eval` share."""

from typing import Annotated

import typer

TokenizerOption = Annotated[
    str,
    typer.Option(
        "--tokenizer",
        "-t",
        metavar="DIR",
        help="Trained tokenizer: a folder, or nano or nano-fixed-16x, which ship with the package.",
        show_default=False,
    ),
]
