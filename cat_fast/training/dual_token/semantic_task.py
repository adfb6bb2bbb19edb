"""Training of the semantic branch: the contrastive stage, and the stage of codes and text states."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cat_fast.dual_token.codebook import usage
from cat_fast.dual_token.semantic.blip2 import blip2_settings, load_blip2
from cat_fast.dual_token.semantic.model import CodeLoss, ContrastiveLoss, SemanticModel
from cat_fast.dual_token.semantic.text_target import TextTarget, open_text_target
from cat_fast.errors import UserError
from cat_fast.models.build import build_model
from cat_fast.training.checkpoints.engine_state import (
    load_engine,
    parameter_count,
    save_engine,
    saved_bytes,
)
from cat_fast.training.checkpoints.initial_settings import model_settings, require_same_settings
from cat_fast.training.checkpoints.initial_weights import load_initial_weights
from cat_fast.training.checkpoints.space import StateBytes
from cat_fast.training.checkpoints.write_errors import defer_write_errors
from cat_fast.training.config.dual_token import SemanticRun
from cat_fast.training.dual_token.codebook_updates import CodebookUpdates
from cat_fast.training.dual_token.pairs import PairBatch, Pairs
from cat_fast.training.dual_token.semantic_evaluation import SemanticEvaluation
from cat_fast.training.rehearsal import LargestStep
from cat_fast.training.runtime.collective_errors import on_each, on_main
from cat_fast.training.runtime.ema import EMA
from cat_fast.training.runtime.engine import in_precision, learning_rate, make_engine, set_learning_rate
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.seeding import seed_step
from cat_fast.training.runtime.stand_ins import stand_in_parameters
from cat_fast.training.runtime.step_context import describe_batch
from cat_fast.training.step import Backward

_TERMS = {
    "contrastive": ("loss", "accuracy"),
    "codes": ("loss", "cosine", "states", "lengths", "state_cosine", "commitment", "codebook"),
}


class SemanticTask:
    """Implements `loop.Task` for a stage of the semantic branch.

    The step determines its pairs. All ranks have equally many, so that means over ranks are means over pairs.
    """

    amounts = ("images",)

    def __init__(self, config: SemanticRun, ranks: Ranks) -> None:
        self.config, self.ranks, self.stage = config, ranks, config.stage
        self.target = on_each(lambda: open_text_target(config.text_target, config.num_states), ranks)
        self.arguments = on_each(lambda: _arguments(config, self.target), ranks)
        torch.manual_seed(config.seed)
        self.model = build_model(SemanticModel, self.arguments)
        if config.blip2:
            on_each(lambda: load_blip2(self.model, config.blip2), ranks)
        self.initial_weights = on_each(
            lambda: load_initial_weights(self.model, config.initial_weights, ()), ranks
        )
        self._freeze()
        self.engine = make_engine(self.model, config.optimizer, config.deepspeed, precision=config.precision)
        defer_write_errors(self.engine, ranks)
        self.ema = EMA(self.model, config.ema_decay, ranks)
        self.codebook = CodebookUpdates(
            self.model.quantizer, config.codebook, "quantizer.codebook", config.seed, ranks
        )
        self.pairs = on_each(lambda: Pairs(config.data, config.seed, ranks), ranks)
        self._batch: PairBatch | None = None
        self._step = 0
        self.evaluation: SemanticEvaluation | None = None
        if config.data.held_out and 0 < config.evaluation.every_steps <= config.schedule.total_steps:
            on_main(self._read_held_out, ranks)

    def _freeze(self) -> None:
        """Keep the weights of other stages fixed, without dropout."""
        self.model.requires_grad_(False)
        self.model.eval()
        with_vision = self.config.train_vision
        for part in self.model.trained_parts(self.stage, with_vision):
            part.requires_grad_(True)
            part.train()

    def _read_held_out(self) -> None:
        config = self.config
        self.evaluation = SemanticEvaluation(
            config.data, config.evaluation.images, self.target, self.ranks.device
        )

    def draw(self, step: int) -> Sequence[float]:
        self._batch = self.pairs.batch(step)
        self.ranks.step_context.set_batches([describe_batch(self._batch.keys)])
        return [len(self._batch.images)]

    def undraw(self) -> None:
        """Do nothing: the position in the data is the step."""

    def backward(self, step: int, totals: Mapping[str, float]) -> Backward:
        config, batch, names = self.config, self._batch, _TERMS[self.stage]
        assert batch is not None
        self._batch, self._step = None, step
        seed_step(config.seed, step, self.ranks.rank)
        set_learning_rate(self.engine, learning_rate(config.optimizer.lr, config.schedule, step))
        terms, output = self._loss(self.engine, batch)
        self.ranks.step_context.start_waiting()  # from here on ranks wait for each other
        self.engine.backward(terms["loss"])
        values = torch.stack([terms[name].detach().double() for name in names])
        sums = [values * len(batch.images)]
        if isinstance(output, CodeLoss):
            self.codebook.add(output.features, output.quantized.codes)
            sums.append(self.codebook.pack(step))

        def metrics(found: Tensor) -> dict[str, float]:
            means = dict(zip(names, (found[: len(names)] / totals["images"]).tolist(), strict=True))
            if self.stage == "codes":
                used = usage(self.codebook.counts(found[len(names) :]))
                means |= {"codes_used": used.share, "perplexity": used.perplexity}
            return {**means, **totals}

        return Backward(
            losses={name: terms[name].detach()[None] for name in names},
            engines={"semantic": self.engine},
            sums=torch.cat(sums),
            metrics=metrics,
        )

    def update(self, backward: Backward, sums: Tensor) -> None:
        self.engine.step()
        self.ema.update()
        if self.stage == "codes":
            self.codebook.apply(self._step, sums[len(_TERMS["codes"]) :], self.ema)

    def _loss(self, model: Any, batch: PairBatch) -> tuple[dict[str, Tensor], ContrastiveLoss | CodeLoss]:
        device, config = self.ranks.device, self.config
        images, own = batch.images.to(device), batch.own.to(device)
        if self.stage == "contrastive":
            texts = [states.to(device) for states in self.target.states(batch.texts)]
            output = model("contrastive", images, texts, own)
            return {"loss": output.loss, "accuracy": output.accuracy}, output
        texts = [
            states.to(device) for states in self.target.states([batch.texts[i] for i in batch.own.tolist()])
        ]
        output = model("codes", images, texts)
        quantized = output.quantized
        loss = (
            config.cosine_weight * output.cosine
            + config.state_weight * output.states
            + config.length_weight * output.lengths
            + config.codebook.commitment_weight * quantized.commitment
            + quantized.codebook
        )
        terms = {name: getattr(output, name) for name in ("cosine", "states", "lengths", "state_cosine")}
        terms |= {"loss": loss, "commitment": quantized.commitment, "codebook": quantized.codebook}
        return terms, output

    def save(self, folder: Path) -> None:
        save_engine(self.engine, folder / "semantic")
        self.ema.save(folder / "ema.safetensors")
        if self.ranks.is_main:
            state = {"ema_updates": self.ema.updates, "began_with": self._initial_settings()}
            (folder / "task.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        state = json.loads((folder / "task.json").read_text())
        require_same_settings(state["began_with"], self._initial_settings())
        load_engine(self.engine, folder / "semantic", self.ranks, "model")
        self.ema.load(folder / "ema.safetensors", state["ema_updates"])

    def _initial_settings(self) -> dict[str, Any]:
        return {
            **model_settings(dict(self.model.config), free=()),
            "stage": self.stage,
            "seed": self.config.seed,
            "data.batch_size": self.config.data.batch_size,
            "data.index": len(self.pairs.records),
            "train_vision": self.config.train_vision,
            "initial_weights": self.initial_weights,
        }

    def largest_step(self) -> LargestStep:
        batch = self.pairs.batch(0)

        def run() -> None:
            forward = in_precision(self.model, self.config.precision, self.ranks.device)
            with stand_in_parameters(self.model):
                self._loss(forward, batch)[0]["loss"].backward()

        return LargestStep(
            what=f"{len(batch.images)} pairs", lower="data.batch_size", settings="data and model", run=run
        )

    def state_bytes(self) -> StateBytes:
        model = 4 * parameter_count(self.model)
        return StateBytes(checkpoint=saved_bytes(self.engine) + model, model=model)

    def grid(self, step: int, columns: int | None = None) -> None:
        """Return None: the semantic branch draws no images."""

    def evaluate(self) -> dict[str, float] | None:
        """Return retrieval, or the similarity of decoded embeddings and the use of the codebook."""
        if self.evaluation is None:
            return None
        with torch.random.fork_rng(devices=[]):
            averaged = build_model(SemanticModel, self.arguments).to(self.ranks.device)
        averaged.load_state_dict(self.model.state_dict() | self.ema.averaged)
        return self.evaluation.evaluate(averaged.eval(), self.stage)

    def export(self, folder: Path) -> None:
        averaged = build_model(SemanticModel, self.arguments) if self.ranks.is_main else None
        if averaged is not None:
            averaged.load_state_dict(self.model.state_dict())  # with the buffers of the codebook
        self.ema.copy_to(averaged)
        if averaged is not None:
            averaged.save_pretrained(folder)

    def close(self) -> None:
        """Do nothing: images are read in this process."""


def _arguments(config: SemanticRun, target: TextTarget) -> dict[str, Any]:
    """Return the model's arguments, with those that the text encoder and BLIP-2 determine.

    Raises:
        UserError: the configuration sets one of them.
    """
    derived: dict[str, Any] = {
        "text_width": target.width,
        "num_states": target.num_states,
        "variable_length": target.variable_length,
        "text_fingerprint": target.fingerprint(),
    }
    if config.blip2:
        derived |= blip2_settings(config.blip2)
    if duplicates := sorted(derived.keys() & config.model.keys()):
        raise UserError(f"model.{duplicates[0]}: text_target or blip2 determine it; remove the key")
    return {**config.model, **derived}
