"""One rank that trains every case of `gan_case.py`, each with new engines.

`run_ranks` starts `main(OUT)` once per rank. It writes to OUT/<case>: `straight`, the complete state at the
end; `rank<r>`, the weights of a rank; metrics.json; and dtypes.json, the dtypes of the computation. Saved
cases also have the checkpoint `half`; `saved`, the state at the checkpoint; and `resumed`, the state at the
end of a second training that resumed from it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from cat_fast.data.image_batch import ImageBatch
from cat_fast.kernels.linear.op import using
from cat_fast.training.runtime.ema import EMA
from cat_fast.training.runtime.ranks import Ranks, start, stop
from cat_fast.training.step import Backward
from cat_fast.training.tokenizer.trainer import TokenizerTrainer
from tests.training.engine_state import forward_weights, full_state
from tests.training.steps import step_metrics
from tests.training.tokenizer.gan_case import (
    CASES,
    CHECKPOINT_STEP,
    RATIOS,
    STEPS,
    Case,
    ratio_of,
    tiny_models,
)


class Training:
    """Trainer and EMA, as in the task, on the images of a case."""

    def __init__(self, case: Case, folder: Path, ranks: Ranks) -> None:
        self.case, self.ranks = case, ranks
        config = case.run(folder)
        self.trainer = TokenizerTrainer(config, *tiny_models(), ranks)
        self.ema = EMA(self.trainer.engine.module, config.ema_decay, ranks)

    def step(self, step: int) -> dict[str, float]:
        self.batches = [
            ImageBatch(images=images, ratio=ratio_of(step, self.ranks.rank, part))
            for part, images in enumerate(
                self.case.images(step, self.ranks.rank, part) for part in range(self.case.accumulation_steps)
            )
        ]
        return step_metrics(self, self.trainer.config, self.ranks, step)

    amounts = ("images", "tokens", "flops")

    def draw(self, step: int) -> Sequence[float]:
        return list(self.trainer.work(step, self.batches).values())

    def undraw(self) -> None: ...

    def backward(self, step: int, totals: Mapping[str, float]) -> Backward:
        found = self.trainer.backward(step, self.batches, totals["images"])
        return replace(found, metrics=lambda sums: {**found.metrics(sums), **totals})

    def update(self, backward: Backward, sums: torch.Tensor) -> None:
        self.trainer.update(backward, sums)
        self.ema.update()

    def save(self, folder: Path) -> None:
        state = self.trainer.save(folder)
        self.ema.save(folder / "ema.safetensors")
        if self.ranks.is_main:
            (folder / "task.json").write_text(json.dumps(state | {"ema_updates": self.ema.updates}))
        self.ranks.barrier()

    def load(self, folder: Path) -> None:
        state = json.loads((folder / "task.json").read_text())
        self.trainer.load(folder, state)
        self.ema.load(folder / "ema.safetensors", state["ema_updates"])

    def state(self) -> dict[str, torch.Tensor]:
        """Collective: return the complete, unpartitioned state on rank 0."""
        state = full_state(self.trainer.engine, "model")
        state |= full_state(self.trainer.discriminator, "discriminator")
        state |= {f"ema.{name}": value.contiguous() for name, value in self.ema.gather().items()}
        lecam = self.trainer.lecam
        return state | {"lecam": torch.tensor([lecam.real, lecam.fake], dtype=torch.float64)}


def train(case: Case, out: Path, ranks: Ranks) -> None:
    folder, own = out / case.name, out / f"rank{ranks.rank}"
    own.mkdir(exist_ok=True)
    if ranks.is_main:
        (folder / "half").mkdir(parents=True)
    ranks.barrier()

    def write(name: str, state: dict[str, torch.Tensor]) -> None:
        if ranks.is_main:
            save_file(state, folder / f"{name}.safetensors")

    training = Training(case, own, ranks)
    dtypes = watch_dtypes(training.trainer)
    metrics = []
    for step in range(CHECKPOINT_STEP):
        if step in (0, 3):  # a rehearsal must not change anything; the tests compare with plain torch
            training.trainer.largest_step(RATIOS[0], 2).run()
        metrics.append(training.step(step))
    if case.saved:
        training.save(folder / "half")
        write("saved", training.state())
    metrics += [training.step(step) for step in range(CHECKPOINT_STEP, STEPS)]
    write("straight", training.state())
    engines = training.trainer.engine, training.trainer.discriminator
    held = forward_weights(engines[0], "model") | forward_weights(engines[1], "discriminator")
    save_file(held, folder / f"rank{ranks.rank}.safetensors")
    if ranks.is_main:
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "dtypes.json").write_text(json.dumps(dtypes))
    if case.saved:
        training = Training(case, own, ranks)
        training.load(folder / "half")
        assert [training.step(step) for step in range(CHECKPOINT_STEP, STEPS)] == metrics[CHECKPOINT_STEP:]
        write("resumed", training.state())


def watch_dtypes(trainer: TokenizerTrainer) -> dict[str, str]:
    """Return a dictionary that records, during the trainer's steps, all dtypes of each tensor of interest."""
    seen: dict[str, str] = {}

    def note(name: str, tensor: torch.Tensor) -> None:
        if str(tensor.dtype) not in seen.setdefault(name, str(tensor.dtype)):
            seen[name] += f" {tensor.dtype}"

    def watch_loss(name: str, engine) -> None:
        backward = engine.backward

        def noted(loss: torch.Tensor) -> None:
            note(f"{name}'s loss", loss)
            backward(loss)

        engine.backward = noted

    trainer.engine.module.register_forward_hook(lambda _m, _x, y: note("autoencoder's output", y[0]))
    discriminator = trainer.discriminator.module
    discriminator.register_forward_pre_hook(lambda _m, x: note("discriminator's input", x[0]))
    discriminator.register_forward_hook(lambda _m, _x, y: note("discriminator's logits", y))
    watch_loss("autoencoder", trainer.engine)
    watch_loss("discriminator", trainer.discriminator)
    return seen


def main(out: str) -> None:
    ranks = start()
    for case in CASES:
        with using(case.linear_backend):
            train(case, Path(out), ranks)
    ranks.barrier()
    stop()
