"""`cat-fast eval`: the group of evaluation commands, one file each (`eval_*.py`)."""

import typer

from cat_fast.cli.eval_alignment import alignment
from cat_fast.cli.eval_classification import classification
from cat_fast.cli.eval_complexity import complexity
from cat_fast.cli.eval_generation import generation, reference
from cat_fast.cli.eval_pareto import pareto
from cat_fast.cli.eval_ranking import ranking, tally
from cat_fast.cli.eval_reconstruction import reconstruction
from cat_fast.cli.eval_table import table

evaluation = typer.Typer(
    no_args_is_help=True,
    help="Evaluate tokenizers and generated images, and print the paper's tables with our figures.",
)


@evaluation.callback()
def _evaluation() -> None:
    """Evaluate tokenizers and generated images, and print the paper's tables with our figures."""


evaluation.command()(complexity)
evaluation.command()(generation)
evaluation.command()(reference)
evaluation.command()(reconstruction)
evaluation.command()(table)
evaluation.command()(pareto)
evaluation.command()(classification)
evaluation.command()(alignment)
evaluation.command()(ranking)
evaluation.command()(tally)
