"""Training of a classification head on labelled arrays."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from cat_fast.data.files import set_default_mode
from cat_fast.errors import UserError
from cat_fast.evaluation.classification.arrays import LabelledArrays, read_arrays
from cat_fast.training.checkpoints.engine_state import load_engine, parameter_count, save_engine, saved_bytes
from cat_fast.training.checkpoints.initial_settings import require_same_settings
from cat_fast.training.checkpoints.space import StateBytes
from cat_fast.training.checkpoints.write_errors import defer_write_errors
from cat_fast.training.config.settings import ProbeRun
from cat_fast.training.probe.model import Probe
from cat_fast.training.rehearsal import LargestStep
from cat_fast.training.runtime.engine import in_precision, learning_rate, make_engine, set_learning_rate
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.seeding import epoch_order
from cat_fast.training.runtime.stand_ins import stand_in_parameters
from cat_fast.training.step import Backward

PREDICTIONS = "predictions.npy"
_TEST_BATCH = 64


class ProbeTask:
    """Implements `loop.Task` for a classification head.

    Epoch e visits the images in a permutation drawn from the seed and e, so a step determines its batch.
    """

    amounts = ("images",)

    def __init__(self, config: ProbeRun, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.train = read_arrays(Path(config.data.train))
        self.test = read_arrays(Path(config.data.test))
        if (
            self.train.classes != self.test.classes
            or self.train.inputs.shape[1:] != self.test.inputs.shape[1:]
        ):
            raise UserError("data.train and data.test: expected arrays with the same classes and sizes")
        torch.manual_seed(config.seed)
        finetune = Path(config.finetune) if config.finetune else None
        self.model = Probe(self._width(), len(self.train.classes), finetune, config.pooled)
        self.engine = make_engine(self.model, config.optimizer, config.deepspeed, precision=config.precision)
        defer_write_errors(self.engine, ranks)
        self._batch: np.ndarray = np.empty(0, np.int64)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.config.data.batch_size)

    def _width(self) -> int:
        if not self.config.finetune:
            if self.train.inputs.ndim != 2:
                raise UserError(f"data.train: expected features (N, D), got {self.train.inputs.shape}")
            return self.train.inputs.shape[1]
        from cat_fast.models.load import load_tokenizer

        tokenizer = load_tokenizer(Path(self.config.finetune), "cpu")
        channels = tokenizer.config["latent_channels"]
        side = self.train.inputs.shape[-1] // min(tokenizer.ratios)
        return channels if self.config.pooled else channels * side**2

    def draw(self, step: int) -> Sequence[float]:
        epoch, number = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.config.seed, epoch, len(self.train))
        size = self.config.data.batch_size
        self._batch = np.sort(order[number * size : (number + 1) * size])[
            self.ranks.rank :: self.ranks.world_size
        ]
        self.ranks.step_context.set_batches([f"{len(self._batch)} images"])
        return [len(self._batch)]

    def undraw(self) -> None:
        """Do nothing: the position in the data is the step."""

    def backward(self, step: int, totals: Mapping[str, float]) -> Backward:
        set_learning_rate(self.engine, learning_rate(self.config.optimizer.lr, self.config.schedule, step))
        loss, correct = self._loss(self.engine, self._batch)
        self.ranks.step_context.start_waiting()  # from here on ranks wait for each other
        self.engine.backward(loss * (self.ranks.world_size / totals["images"]))
        sums = torch.stack([loss.detach().double(), correct.double()])
        return Backward(
            losses={"loss": loss.detach()[None]},
            engines={"probe": self.engine},
            sums=sums,
            metrics=lambda found: {
                "loss": found[0].item() / totals["images"],
                "accuracy": found[1].item() / totals["images"],
                **totals,
            },
        )

    def update(self, backward: Backward, sums: Tensor) -> None:
        self.engine.step()

    def _loss(self, model: Callable[..., Any], batch: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the sum of the images' losses, and the number of right answers."""
        rows = batch if len(batch) else np.zeros(1, np.int64)  # a rank without images joins with weight 0
        inputs, ratios, labels = _load(self.train, rows, self.ranks.device)
        logits = model(inputs, ratios).float()
        weight = float(len(batch) > 0)
        correct = (logits.argmax(1) == labels).sum() * weight
        return F.cross_entropy(logits, labels, reduction="sum") * weight, correct

    def save(self, folder: Path) -> None:
        save_engine(self.engine, folder / "probe")
        if self.ranks.is_main:
            (folder / "task.json").write_text(json.dumps(self._initial_settings()))

    def load(self, folder: Path) -> None:
        require_same_settings(json.loads((folder / "task.json").read_text()), self._initial_settings())
        load_engine(self.engine, folder / "probe", self.ranks, "data")

    def _initial_settings(self) -> dict[str, object]:
        return {
            "seed": self.config.seed,
            "data.train": self.train.record["source"],
            "data.batch_size": self.config.data.batch_size,
            "finetune": self.config.finetune,
            "pooled": self.config.pooled,
        }

    def largest_step(self) -> LargestStep:
        count = min(len(self.train), self.config.data.batch_size)

        def run() -> None:
            forward = in_precision(self.model, self.config.precision, self.ranks.device)
            with stand_in_parameters(self.model):
                self._loss(forward, np.arange(count))[0].backward()

        return LargestStep(
            what=f"{count} images", lower="data.batch_size", settings="data and finetune", run=run
        )

    def state_bytes(self) -> StateBytes:
        return StateBytes(checkpoint=saved_bytes(self.engine), model=4 * parameter_count(self.model))

    def grid(self, step: int, columns: int | None = None) -> None:
        """Return None: a probe has no decoder."""

    def evaluate(self) -> None:
        """Return None: the test images are classified once, at the end."""

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Write the head and the predicted class of each test image; for fine-tuning, the tokenizer, too."""
        if not self.ranks.is_main:
            return
        folder.mkdir(parents=True)
        found = []
        for start in range(0, len(self.test), _TEST_BATCH):
            rows = np.arange(start, min(start + _TEST_BATCH, len(self.test)))
            inputs, ratios, _ = _load(self.test, rows, self.ranks.device)
            found.append(self.model(inputs, ratios).argmax(1).cpu().numpy())
        np.save(folder / PREDICTIONS, np.concatenate(found))
        head = {name: value.contiguous().cpu() for name, value in self.model.head.state_dict().items()}
        save_file(head, folder / "head.safetensors")
        set_default_mode(folder / "head.safetensors")
        if self.model.tokenizer is not None:
            cast(Any, self.model.tokenizer).save_pretrained(folder / "tokenizer")

    def close(self) -> None:
        """Do nothing: the arrays are mapped from their files."""


def _load(arrays: LabelledArrays, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    inputs, ratios, labels = (
        torch.from_numpy(np.ascontiguousarray(array[rows])).to(device)
        for array in (arrays.inputs, arrays.ratios, arrays.labels)
    )
    return inputs, ratios, labels
