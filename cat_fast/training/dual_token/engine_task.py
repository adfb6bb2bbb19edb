"""Base of the dual-token tokenizer's training tasks: one engine, its averages, checkpoints and export."""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from cat_fast.models.build import build_model
from cat_fast.training.checkpoints.engine_state import (
    load_engine,
    parameter_count,
    save_engine,
    saved_bytes,
)
from cat_fast.training.checkpoints.initial_settings import require_same_settings
from cat_fast.training.checkpoints.initial_weights import load_initial_weights
from cat_fast.training.checkpoints.space import StateBytes
from cat_fast.training.checkpoints.write_errors import defer_write_errors
from cat_fast.training.config.settings import RunConfig
from cat_fast.training.runtime.collective_errors import on_each
from cat_fast.training.runtime.ema import EMA
from cat_fast.training.runtime.engine import make_engine
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.step import Backward


class EngineTask(ABC):
    """Base of the tasks with one model. Subclasses implement the rest of `loop.Task`.

    Args:
        arguments: of the model, whose class is `kind`.
    """

    kind: ClassVar[Any]
    """Class of the model."""
    engine_name: ClassVar[str]
    """Name of the engine, in checkpoints."""

    def __init__(self, config: RunConfig, ranks: Ranks, arguments: dict[str, Any]) -> None:
        self.ranks, self.arguments = ranks, arguments
        torch.manual_seed(config.seed)
        self.model: Any = build_model(self.kind, arguments)
        on_each(self.load_pretrained, ranks)
        self.initial_weights = on_each(
            lambda: load_initial_weights(self.model, config.initial_weights, ()), ranks
        )
        self.freeze()
        self.engine = make_engine(
            self.model, config.optimizer, config.deepspeed, config.accumulation_steps, config.precision
        )
        defer_write_errors(self.engine, ranks)
        self.ema = EMA(self.model, config.ema_decay, ranks)

    def load_pretrained(self) -> None:  # noqa: B027 # few tasks have published weights
        """Copy published weights into the new model."""

    def freeze(self) -> None:  # noqa: B027 # most tasks train all parameters
        """Exclude parameters from training."""

    @abstractmethod
    def initial_settings(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share."""

    def update(self, backward: Backward, sums: Tensor) -> None:
        self.engine.step()
        self.ema.update()

    def save(self, folder: Path) -> None:
        save_engine(self.engine, folder / self.engine_name)
        self.ema.save(folder / "ema.safetensors")
        if self.ranks.is_main:
            state = {"ema_updates": self.ema.updates, "began_with": self.initial_settings()}
            (folder / "task.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        state = json.loads((folder / "task.json").read_text())
        require_same_settings(state["began_with"], self.initial_settings())
        load_engine(self.engine, folder / self.engine_name, self.ranks, "model")
        self.ema.load(folder / "ema.safetensors", state["ema_updates"])

    def state_bytes(self) -> StateBytes:
        model = 4 * parameter_count(self.model)
        return StateBytes(checkpoint=saved_bytes(self.engine) + model, model=model)

    def averaged(self) -> Any:
        """Return a model with the averaged weights and the current buffers, on this rank's device."""
        with torch.random.fork_rng(devices=[]):
            averaged = build_model(self.kind, self.arguments).to(self.ranks.device)
        averaged.load_state_dict(self.model.state_dict() | self.ema.averaged)
        return averaged.eval()

    def export(self, folder: Path) -> None:
        averaged = build_model(self.kind, self.arguments) if self.ranks.is_main else None
        if averaged is not None:
            averaged.load_state_dict(self.model.state_dict())  # with the buffers, such as a codebook
        self.ema.copy_to(averaged)
        if averaged is not None:
            averaged.save_pretrained(folder)
