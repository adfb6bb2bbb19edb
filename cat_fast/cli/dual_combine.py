"""`cat-fast dual combine`: trained parts in the folder of a tokenizer."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cat_fast import console


def combine(
    guide: Annotated[Path, typer.Option("--guide", metavar="DIR", help="Trained guide.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the tokenizer to write.", show_default=False)
    ],
    semantic: Annotated[
        Path | None,
        typer.Option("--semantic", metavar="DIR", help="Model of the stage codes.", show_default=False),
    ] = None,
    renderer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|DIR",
            help="Diffusion model: nano, a pipeline of `cat-fast pipeline`, or a Stable Diffusion folder.",
            show_default=False,
        ),
    ] = None,
    ratio: Annotated[
        int | None,
        typer.Option(
            help="Compression ratio of the diffusion model; default: its lowest.", show_default=False
        ),
    ] = None,
) -> None:
    """Combine trained parts into one folder, for `cat-fast dual encode` and `decode`.

    The folder refers to the diffusion model by its name or path; its weights are not copied.

    Example:

        cat-fast dual combine --guide runs/nano_dual_guide/model --semantic runs/nano_dual_codes/model \\
            --renderer nano -o runs/dual_tokenizer
    """
    from cat_fast.dual_token.guide.model import GuideModel
    from cat_fast.dual_token.semantic.model import SemanticModel
    from cat_fast.dual_token.tokenizer import DualTokenizer, Renderer
    from cat_fast.errors import UserError
    from cat_fast.models.load import load_model

    if ratio is not None and renderer is None:
        raise UserError("--ratio: applies to --renderer; give one")
    tokenizer = DualTokenizer(
        load_model(GuideModel, "guide", guide, "cpu"),
        None if semantic is None else load_model(SemanticModel, "semantic branch", semantic, "cpu"),
        None if renderer is None else Renderer(model=renderer, ratio=ratio),
    )
    if renderer is not None:
        _ = tokenizer.backend  # fails here rather than at the first image
    tokenizer.save_pretrained(out)
    console.out.print(Text(f"Tokenizer written to {out}"), soft_wrap=True)
