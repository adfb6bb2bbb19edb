"""What a run tells: JSON lines and TensorBoard always, a progress bar on a terminal."""

import json
import time
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from cat_fast.console import progress
from cat_fast.data.files import atomic_write

METRICS = "metrics.jsonl"


class RunLog:
    """Writes one record a step: `{"step": …, "seconds": …, metric: value, …}`.

    Records of steps that a resumed run will do again are dropped when it opens: no step is told twice.
    """

    def __init__(self, folder: Path, name: str, first_step: int, total_steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        kept = [r for r in read_metrics(folder) if r["step"] < first_step]
        with atomic_write(path) as part:
            part.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self.file = path.open("a", buffering=1)
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self.progress = progress("steps")
        self.bar = self.progress.add_task(name, total=total_steps, completed=first_step)
        self.last = time.perf_counter()

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.stop()
        self.file.close()
        self.tensorboard.close()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        now = time.perf_counter()
        record = {"step": step, "seconds": round(now - self.last, 4), **metrics}
        self.last = now
        self.file.write(json.dumps(record) + "\n")
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, step)
        self.progress.update(self.bar, completed=step + 1)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The records of a run so far; a line cut off by a kill is left out."""
    path = folder / METRICS
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
