"""`cat-fast dual train`: a training stage of the dual-token tokenizer, with progress."""

import importlib.resources
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from cat_fast import console
from cat_fast.errors import UserError


def train(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="YAML file of the stage, or the name of a packaged one, such as nano_guide.",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as schedule.total_steps=100."),
    ] = None,
    ranks: Annotated[int, typer.Option(min=0, help="Training processes; 0: one per GPU, or two on CPU.")] = 0,
) -> None:
    """Train a stage of the dual-token tokenizer with DeepSpeed; run the same command again to resume.

    The run's folder, `output_dir`, gets checkpoints, metrics.jsonl, sheets of held-out images, the log
    train.log and, at the end, the trained part in model/. On Ctrl-C, SIGTERM or a closed terminal, the run
    saves a checkpoint. `cat-fast runs` lists the state of all runs.

    Examples:

        cat-fast dual train nano_guide data.index=corpus/train.jsonl data.held_out=corpus/held_out.jsonl

        cat-fast dual train configs/dual_token/guide.yaml --ranks 8
    """
    with ExitStack() as stack:
        path = Path(config)
        if not path.suffix:
            packaged = importlib.resources.files("cat_fast.configs") / "dual_token"
            known = sorted(file.name[:-5] for file in packaged.iterdir() if file.name.endswith(".yaml"))
            if config not in known:
                raise UserError(f"{config}: expected a YAML file, or one of the packaged {', '.join(known)}")
            path = stack.enter_context(importlib.resources.as_file(packaged)) / f"{config}.yaml"

        from cat_fast.training.config.load import load_run

        given = list(overrides or ())
        run = load_run(str(path), given)
        if not run.task.startswith("dual_"):
            raise UserError(
                f"{config}: expected a stage of the dual-token tokenizer, got task {run.task}; start it with"
                " deepspeed --module cat_fast.train"
            )

        from cat_fast.training.launch import default_ranks, launch
        from cat_fast.training.loop import EXPORT

        folder = Path(run.output_dir)
        with console.progress("steps") as bar:
            task = bar.add_task("training", total=run.schedule.total_steps)

            def on_step(done: int, metrics: dict[str, float]) -> None:
                bar.update(task, completed=done)
                bar.note = f"loss {metrics['loss']:.4g}"

            launch(
                path,
                given,
                run_folder=folder,
                log=folder / "train.log",
                ranks=ranks or default_ranks(),
                on_step=on_step,
            )
    console.out.print(Text(f"Trained model written to {folder / EXPORT}"), soft_wrap=True)
