"""Entry point of `cat-fast`. Commands import torch only when they run, so that help is fast."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cat_fast import __version__
from cat_fast.cli.codec import EncodeCommand, decode, encode
from cat_fast.cli.data import data
from cat_fast.cli.demo import demo
from cat_fast.cli.dual import dual
from cat_fast.cli.encode_shards import encode_shards
from cat_fast.cli.evaluation import evaluation
from cat_fast.cli.fetch import fetch
from cat_fast.cli.info import info
from cat_fast.cli.pipeline import pipeline
from cat_fast.cli.plan import plan
from cat_fast.cli.runs import runs
from cat_fast.cli.sample import sample
from cat_fast.cli.score import ScoreCommand, score
from cat_fast.cli.serve import serve
from cat_fast.cli.shard import shard
from cat_fast.console import out, print_error, safe_output
from cat_fast.errors import UserError
from cat_fast.processes.signals import interruptible, report


class _OneLineErrors(TyperGroup):
    """Command group that reports user errors and interruptions on one line, with their own exit codes."""

    def main(self, *args: Any, **options: Any) -> Any:
        with safe_output():
            return super().main(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with interruptible():
            try:
                return super().invoke(ctx)
            except UserError as error:
                print_error(error)
                raise typer.Exit(2) from error
            except KeyboardInterrupt as interrupt:
                raise typer.Exit(report(interrupt)) from interrupt


app = typer.Typer(
    name="cat-fast",
    cls=_OneLineErrors,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command(cls=ScoreCommand)(score)
app.command()(shard)
app.command(cls=EncodeCommand)(encode)
app.command()(decode)
app.command()(encode_shards)
app.command()(pipeline)
app.command()(sample)
app.command()(serve)
app.command()(fetch)
app.command()(runs)
app.command()(info)
app.add_typer(data, name="data")
app.add_typer(dual, name="dual")
app.add_typer(evaluation, name="eval")
app.add_typer(plan, name="plan")


def main() -> None:
    """Run the `cat-fast` script.

    Exit codes: 0 success; 1 some inputs failed, the others succeeded; 2 unusable input or arguments, with the
    reason on one line of standard error; 129, 130 or 143 ended by SIGHUP, Ctrl-C or SIGTERM.
    """
    app(prog_name="cat-fast")


def _print_version(requested: bool) -> None:
    if requested:
        out.print(f"cat-fast {__version__}")
        raise typer.Exit


@app.callback()
def _cat_fast(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Content-adaptive image tokenization: simple images get few tokens, complex ones many.

    Captions determine the number of tokens (score). The tokenizer compresses images to latents of that size
    (encode, decode), and a diffusion transformer generates them (sample). Start with cat-fast demo.
    """
