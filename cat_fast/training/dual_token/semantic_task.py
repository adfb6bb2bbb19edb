"""Training of the semantic branch: the contrastive stage, and the stage of codes and text states."""

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
from cat_fast.training.checkpoints.initial_settings import model_settings
from cat_fast.training.config.dual_token import SemanticRun
from cat_fast.training.dual_token.codebook_updates import CodebookUpdates
from cat_fast.training.dual_token.engine_task import EngineTask
from cat_fast.training.dual_token.pairs import PairBatch, open_pairs
from cat_fast.training.dual_token.semantic_evaluation import SemanticEvaluation
from cat_fast.training.rehearsal import LargestStep
from cat_fast.training.runtime.collective_errors import on_each, on_main
from cat_fast.training.runtime.engine import in_precision, learning_rate, set_learning_rate
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.seeding import seed_step
from cat_fast.training.runtime.stand_ins import stand_in_parameters
from cat_fast.training.runtime.step_context import describe_batch
from cat_fast.training.step import Backward

_TERMS = {
    "contrastive": ("loss", "accuracy"),
    "codes": ("loss", "cosine", "states", "lengths", "state_cosine", "commitment", "codebook"),
}


class SemanticTask(EngineTask):
    """Implements `loop.Task` for a stage of the semantic branch.

    All ranks have equally many pairs, so that means over ranks are means over pairs.
    """

    kind, engine_name = SemanticModel, "semantic"

    def __init__(self, config: SemanticRun, ranks: Ranks) -> None:
        self.config, self.stage = config, config.stage
        self.target = on_each(lambda: open_text_target(config.text_target, config.num_states), ranks)
        super().__init__(config, ranks, on_each(lambda: _arguments(config, self.target), ranks))
        self.codebook = CodebookUpdates(
            self.model.quantizer, config.codebook, "quantizer.codebook", config.seed, ranks
        )
        self.pairs = open_pairs(config.data, config.seed, ranks)
        self.amounts = ("images", *self.pairs.amounts)
        self._batch: PairBatch | None = None
        self._step = 0
        self.evaluation: SemanticEvaluation | None = None
        if config.data.held_out and 0 < config.evaluation.every_steps <= config.schedule.total_steps:
            on_main(self._read_held_out, ranks)

    def load_pretrained(self) -> None:
        """Copy the weights of a published BLIP-2."""
        if self.config.blip2:
            load_blip2(self.model, self.config.blip2)

    def freeze(self) -> None:
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
        return [len(self._batch.images), *self._batch.amounts]

    def undraw(self) -> None:
        self.pairs.undraw()

    def backward(self, step: int, totals: Mapping[str, float]) -> Backward:
        config, batch, names = self.config, self._batch, _TERMS[self.stage]
        assert batch is not None
        self._batch, self._step = None, step
        seed_step(config.seed, step, self.ranks.rank)
        set_learning_rate(self.engine, learning_rate(config.optimizer.lr, config.schedule, step))
        captions, own = self._candidates(batch.captions)
        terms, output = self._loss(self.engine, batch.images, captions, own)
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
        super().update(backward, sums)
        if self.stage == "codes":
            self.codebook.apply(self._step, sums[len(_TERMS["codes"]) :], self.ema)

    def _candidates(self, captions: list[str]) -> tuple[list[str], Tensor]:
        """Collective: return the captions that a rank's images are compared with, and the number of each
        image's own among them: those of all ranks in the contrastive stage, else the rank's.
        """
        own = torch.arange(len(captions))
        if self.stage != "contrastive":
            return captions, own
        self.ranks.step_context.start_waiting()
        gathered = self.ranks.gather(captions)
        self.ranks.step_context.stop_waiting()
        before = sum(map(len, gathered[: self.ranks.rank]))
        return [caption for part in gathered for caption in part], own + before

    def _loss(
        self, model: Any, images: Tensor, captions: Sequence[str], own: Tensor
    ) -> tuple[dict[str, Tensor], ContrastiveLoss | CodeLoss]:
        device, config = self.ranks.device, self.config
        images, own = images.to(device), own.to(device)
        texts = [states.to(device) for states in self.target.states(captions)]
        if self.stage == "contrastive":
            output = model("contrastive", images, texts, own)
            return {"loss": output.loss, "accuracy": output.accuracy}, output
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
        super().save(folder)
        self.pairs.save(folder)

    def load(self, folder: Path) -> None:
        super().load(folder)
        self.pairs.load(folder)

    def initial_settings(self) -> dict[str, Any]:
        return {
            **model_settings(dict(self.model.config), free=()),
            "stage": self.stage,
            "seed": self.config.seed,
            "data.batch_size": self.config.data.batch_size,
            **self.pairs.identity,
            "train_vision": self.config.train_vision,
            "initial_weights": self.initial_weights,
        }

    def largest_step(self) -> LargestStep:
        data = self.config.data
        count = data.batch_size // self.ranks.world_size
        candidates = data.batch_size if self.stage == "contrastive" else count
        captions = [" ".join(["caption"] * self.target.num_states)] * candidates

        def run() -> None:
            forward = in_precision(self.model, self.config.precision, self.ranks.device)
            images = torch.rand(count, 3, *data.crop_size) * 2 - 1
            with stand_in_parameters(self.model):
                self._loss(forward, images, captions, torch.arange(count))[0]["loss"].backward()

        return LargestStep(what=f"{count} pairs", lower="data.batch_size", settings="data and model", run=run)

    def grid(self, step: int, columns: int | None = None) -> None:
        """Return None: the semantic branch draws no images."""

    def evaluate(self) -> dict[str, float] | None:
        """Return retrieval, or the similarity of decoded embeddings and the use of the codebook."""
        if self.evaluation is None:
            return None
        return self.evaluation.evaluate(self.averaged(), self.stage)

    def close(self) -> None:
        self.pairs.close()


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
