"""One rank that trains every case of `generator_case.py` as a run does.

`run_ranks` starts `main(LATENTS, OUT)` once per rank. It writes a checkpoint to OUT/<case>/half, from which a
second task resumes. Other files in OUT/<case>: `straight` and `resumed`, the complete state at the end of
each training; `saved`, the state at the checkpoint; `rank<r>`, the weights of a rank; metrics.json; and the
exported model.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from cat_fast.kernels.linear.op import using
from cat_fast.training.generator.task import GeneratorTask
from cat_fast.training.runtime.ranks import Ranks, start, stop
from tests.training.engine_state import forward_weights, full_state
from tests.training.generator.generator_case import CASES, CHECKPOINT_STEP, STEPS, Case
from tests.training.steps import train_step


class GeneratorTraining:
    """The task of a run and its complete state."""

    def __init__(self, case: Case, folder: Path, latents: Path, ranks: Ranks) -> None:
        self.task = GeneratorTask(case.run(folder, latents), ranks)
        self.save, self.load = self.task.save, self.task.load

    def step(self, step: int) -> dict[str, float]:
        """Train one step; return its metrics except times."""
        metrics = train_step(self.task, step)
        del metrics["data_seconds"]
        return metrics

    def state(self) -> dict[str, torch.Tensor]:
        """Collective: return the complete, unpartitioned state on rank 0."""
        ema = {f"ema.{name}": value.contiguous() for name, value in self.task.ema.gather().items()}
        return full_state(self.task.engine, "model") | ema


def train(case: Case, latents: Path, out: Path, ranks: Ranks) -> None:
    folder, own = out / case.name, out / f"rank{ranks.rank}"
    own.mkdir(exist_ok=True)
    if ranks.is_main:
        (folder / "half").mkdir(parents=True)
    ranks.barrier()

    def write(name: str, state: dict[str, torch.Tensor]) -> None:
        if ranks.is_main:
            save_file(state, folder / f"{name}.safetensors")

    training = GeneratorTraining(case, own, latents, ranks)
    metrics = []
    for step in range(CHECKPOINT_STEP):
        if step in (0, 3):  # a rehearsal must not change anything; the tests compare with plain torch
            training.task.largest_step().run()
        metrics.append(training.step(step))
    training.save(folder / "half")
    write("saved", training.state())
    metrics += [training.step(step) for step in range(CHECKPOINT_STEP, STEPS)]
    write("straight", training.state())
    save_file(forward_weights(training.task.engine, "model"), folder / f"rank{ranks.rank}.safetensors")
    training.task.export(folder / "model")
    if ranks.is_main:
        (folder / "metrics.json").write_text(json.dumps(metrics))

    training = GeneratorTraining(case, own, latents, ranks)
    training.load(folder / "half")
    assert [training.step(step) for step in range(CHECKPOINT_STEP, STEPS)] == metrics[CHECKPOINT_STEP:]
    write("resumed", training.state())


def main(latents: str, out: str) -> None:
    ranks = start()
    for case in CASES:
        with using(case.linear_backend):
            train(case, Path(latents), Path(out), ranks)
    ranks.barrier()
    stop()
