"""Where a run's figures and images go to be looked at: TensorBoard always, Weights & Biases if asked."""

import secrets
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from cat_fast.data.files import atomic_write
from cat_fast.errors import UserError, first_line
from cat_fast.training.config.settings import RunConfig
from cat_fast.training.metrics.terms_by_ratio import AT_RATIO

TENSORBOARD = "tensorboard"
WANDB_ID = "wandb_id"


class Tracker(Protocol):
    """Takes what a run tells, by step."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def image(self, tag: str, image: Image.Image, step: int) -> None: ...

    def close(self, failed: bool) -> None:
        """At the end of the run, which went wrong or did not."""
        ...


def trackers(folder: Path, config: RunConfig, first_step: int) -> list[Tracker]:
    """Those that the configuration asks for; a resumed run goes on where it was."""
    found: list[Tracker] = [TensorBoard(folder, first_step)]
    if config.logging.wandb_project:
        found.append(WandB(folder, config))
    return found


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=first_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        self.writer.add_image(tag, np.asarray(image), step, dataformats="HWC")
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandB:
    """One wandb run a folder: its id is kept there, so that a resumed run goes on under it.

    Whether it talks to a server is wandb's own to decide (WANDB_MODE, WANDB_API_KEY, WANDB_ENTITY, …). Steps
    that a resumed run does again are not told again: wandb keeps the first telling. Trouble with it later on
    costs the run nothing but what wandb is not told any more.

    Raises:
        UserError: wandb cannot be started.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        import wandb

        self.wandb = wandb
        self.lost = False
        try:
            self.run: Any = wandb.init(
                project=config.logging.wandb_project,
                name=folder.name,
                id=_kept_id(folder / WANDB_ID),
                resume="allow",
                dir=str(folder),
                config=asdict(config),
            )
        except wandb.Error as error:
            raise UserError(
                f"logging.wandb_project: wandb cannot be started ({first_line(error)}): log in, set "
                "WANDB_MODE=offline, or leave the key out"
            ) from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._tell(dict(values), step)

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        self._tell({tag: self.wandb.Image(image)}, step)

    def _tell(self, values: dict[str, Any], step: int) -> None:
        if self.lost:
            return
        try:
            self.run.log(values, step=step)
        except Exception as error:
            self.lost = True
            print(
                f"warning: wandb is told nothing from step {step} on ({first_line(error)}); metrics.jsonl "
                "and TensorBoard are",
                file=sys.stderr,
                flush=True,
            )

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def _kept_id(path: Path) -> str:
    if not path.is_file():
        with atomic_write(path) as part:
            part.write_text(secrets.token_hex(4))
    return path.read_text().strip()


_WORK = ("seconds", "images", "tokens", "flops", "mfu")


def tags(metrics: Mapping[str, float]) -> dict[str, float]:
    """The figures of a step under the names that group them on a dashboard.

    What weighs in the objective lies in `loss/` as it is and in `weighted/` as it weighs; the same at one
    ratio in `per_ratio/` and `per_ratio_weighted/`; work and time in `throughput/`; the rest in `training/`.
    """
    return {_tag(name, metrics): value for name, value in metrics.items() if name != "step"}


def _tag(name: str, metrics: Mapping[str, float]) -> str:
    term = name.removeprefix("weighted/")
    if AT_RATIO.fullmatch(term):
        return f"per_ratio/{term}" if term == name else f"per_ratio_weighted/{term}"
    if name == "loss":
        return "loss/total"
    if f"weighted/{name}" in metrics:
        return f"loss/{name}"
    if name in _WORK or name.endswith(("_seconds", "_per_second")):
        return f"throughput/{name}"
    return name if "/" in name else f"training/{name}"
