"""Experiment trackers: TensorBoard, and Weights & Biases if configured."""

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
    """Destination for a run's metrics and images."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def image(self, tag: str, image: Image.Image, step: int) -> None: ...

    def close(self, failed: bool) -> None:
        """Finish logging at the end of the run; `failed` if it ended with an error."""
        ...


def make_trackers(folder: Path, config: RunConfig, first_step: int) -> list[Tracker]:
    """Create the configured trackers; those of a resumed run continue at `first_step`."""
    created: list[Tracker] = [TensorBoard(folder, first_step)]
    if config.logging.wandb_project:
        created.append(WandB(folder, config))
    return created


class TensorBoard:
    """Tracker that writes event files to the run's folder."""

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
    """Tracker for Weights & Biases, with one wandb run per folder.

    The folder keeps the run's id, so that a resumed run continues it. wandb's own variables apply
    (WANDB_MODE, WANDB_API_KEY, WANDB_ENTITY, …). For steps that a resumed run repeats, wandb keeps the first
    values. If logging fails during the run, a warning is printed and nothing more is logged to wandb.

    Raises:
        UserError: wandb cannot be started.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        import wandb

        self.wandb = wandb
        self.failed = False
        try:
            self.run: Any = wandb.init(
                project=config.logging.wandb_project,
                name=folder.name,
                id=_load_or_create_id(folder / WANDB_ID),
                resume="allow",
                dir=str(folder),
                config=asdict(config),
            )
        except wandb.Error as error:
            raise UserError(
                f"logging.wandb_project: wandb cannot be started ({first_line(error)}): log in, set "
                "WANDB_MODE=offline, or remove the key"
            ) from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._log(dict(values), step)

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        self._log({tag: self.wandb.Image(image)}, step)

    def _log(self, values: dict[str, Any], step: int) -> None:
        if self.failed:
            return
        try:
            self.run.log(values, step=step)
        except Exception as error:
            self.failed = True
            print(
                f"warning: logging to wandb stopped at step {step} ({first_line(error)}); metrics.jsonl and "
                "TensorBoard continue",
                file=sys.stderr,
                flush=True,
            )

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def _load_or_create_id(path: Path) -> str:
    if not path.is_file():
        with atomic_write(path) as part:
            part.write_text(secrets.token_hex(4))
    return path.read_text().strip()


_WORK = ("seconds", "images", "tokens", "flops", "mfu")


def tags(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return a step's metrics under the tags that group them on a dashboard.

    Loss terms are in `loss/`, and multiplied by their weights in `weighted/`; per ratio, in `per_ratio/` and
    `per_ratio_weighted/`. Amounts and times are in `throughput/`, and all others in `training/`.
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
