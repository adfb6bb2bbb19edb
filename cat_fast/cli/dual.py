"""`cat-fast dual`: the command group of the dual-token tokenizer."""

import typer

from cat_fast.cli.dual_codec import decode, encode
from cat_fast.cli.dual_combine import combine
from cat_fast.cli.dual_eval import evaluate
from cat_fast.cli.dual_generate import generate
from cat_fast.cli.dual_train import train

dual = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Dual-token tokenizer: an image as a few discrete tokens for language models (docs/dual_token.md).",
)
dual.command()(encode)
dual.command()(decode)
dual.command()(combine)
dual.command()(train)
dual.command("eval")(evaluate)
dual.command()(generate)
