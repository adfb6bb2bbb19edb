"""Training of the language model over flat sequences, in packed batches with captions as prefix."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cat_fast.dual_token.language.model import DualLanguageModel
from cat_fast.dual_token.semantic.text_target import TextTarget, open_text_target
from cat_fast.dual_token.tokenizer import DualTokenizer
from cat_fast.errors import UserError
from cat_fast.training.checkpoints.initial_settings import model_settings
from cat_fast.training.config.dual_token import LanguageRun
from cat_fast.training.dual_token.encoded_pairs import EncodedPair, encode_pairs, read_encoded
from cat_fast.training.dual_token.engine_task import EngineTask
from cat_fast.training.dual_token.language_evaluation import LanguageEvaluation
from cat_fast.training.dual_token.pairs import spread
from cat_fast.training.rehearsal import LargestStep
from cat_fast.training.runtime.collective_errors import on_each, on_main
from cat_fast.training.runtime.engine import in_precision, learning_rate, set_learning_rate
from cat_fast.training.runtime.ranks import Ranks
from cat_fast.training.runtime.stand_ins import stand_in_parameters
from cat_fast.training.runtime.step_context import describe_batch
from cat_fast.training.step import Backward

TRAIN, HELD_OUT = "sequences.jsonl", "held_out_sequences.jsonl"


class LanguageTask(EngineTask):
    """Implements `loop.Task` for the language model.

    Epoch e visits the sequences in a permutation drawn from the seed and e, so a step determines its batch.
    Every predicted id has the same weight.
    """

    kind, engine_name = DualLanguageModel, "language"
    amounts = ("images", "tokens")

    def __init__(self, config: LanguageRun, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        data, folder = config.data, Path(config.output_dir)
        self._encode(folder)
        self.pairs = read_encoded(folder / TRAIN)
        if len(self.pairs) < data.batch_size or data.batch_size % ranks.world_size:
            raise UserError(
                f"data.batch_size: {data.batch_size}: expected at most the {len(self.pairs)} pairs, and a "
                f"multiple of the {ranks.world_size} ranks"
            )
        self.target: TextTarget = on_each(lambda: open_text_target(data.text_encoder, data.max_states), ranks)
        super().__init__(config, ranks, on_each(self._arguments, ranks))
        self._batch: tuple[list[EncodedPair], list[Tensor]] = ([], [])
        self.evaluation: LanguageEvaluation | None = None
        if data.held_out and 0 < config.evaluation.every_steps <= config.schedule.total_steps:
            on_main(self._read_held_out, ranks)

    def _encode(self, folder: Path) -> None:
        """Collective: encode the pairs, unless they are encoded."""
        data, seed, ranks = self.config.data, self.config.seed, self.ranks
        tokenizer = on_each(self._open_tokenizer, ranks)
        encode_pairs(folder / TRAIN, data.index, "data.index", tokenizer, data, seed, ranks)
        if data.held_out:
            encode_pairs(folder / HELD_OUT, data.held_out, "data.held_out", tokenizer, data, seed, ranks)

    def _open_tokenizer(self) -> DualTokenizer:
        if not self.config.data.tokenizer:
            raise UserError("data.tokenizer is missing: set the folder of a dual-token tokenizer")
        return DualTokenizer.from_pretrained(self.config.data.tokenizer)

    def _arguments(self) -> dict[str, Any]:
        """Return the model's arguments, with those that the tokenizer and the text encoder determine."""
        tokenizer = DualTokenizer.from_pretrained(self.config.data.tokenizer, "cpu")
        derived = {
            "vocab_size": len(tokenizer.vocabulary),
            "text_width": self.target.width,
            "text_fingerprint": self.target.fingerprint(),
            "tokenizer_fingerprint": tokenizer.fingerprint(),
        }
        if duplicates := sorted(derived.keys() & self.config.model.keys()):
            raise UserError(f"model.{duplicates[0]}: the data determine it; remove the key")
        arguments = {**self.config.model, **derived}
        longest = max(len(pair.ids) for pair in self.pairs) + self.target.num_states
        if longest > arguments.get("max_length", 512):
            raise UserError(f"model.max_length: expected at least {longest} for these grids and captions")
        return arguments

    def _read_held_out(self) -> None:
        count = self.config.evaluation.images
        pairs = spread(read_encoded(Path(self.config.output_dir) / HELD_OUT), count)[:count]
        self.evaluation = LanguageEvaluation(self.pairs, pairs, self.target, self.arguments["vocab_size"])

    def draw(self, step: int) -> Sequence[float]:
        data, seed = self.config.data, self.config.seed
        size, world, rank = data.batch_size, self.ranks.world_size, self.ranks.rank
        epoch, number = divmod(step, len(self.pairs) // size)
        order = np.random.default_rng([seed, epoch, 0, 12]).permutation(len(self.pairs))
        dropped = np.random.default_rng([seed, step, 0, 13]).random(size) < data.caption_dropout
        rows = list(enumerate(order[number * size : (number + 1) * size]))[rank::world]
        pairs = [self.pairs[index] for _, index in rows]
        texts = self.target.states([pair.caption for pair in pairs])
        texts = [text[:0] if dropped[place] else text for text, (place, _) in zip(texts, rows, strict=True)]
        self._batch = pairs, texts
        self.ranks.step_context.set_batches([describe_batch([pair.key for pair in pairs])])
        return [len(pairs), sum(len(pair.ids) - 1 for pair in pairs)]

    def undraw(self) -> None:
        """Do nothing: the position in the data is the step."""

    def backward(self, step: int, totals: Mapping[str, float]) -> Backward:
        config, (pairs, texts) = self.config, self._batch
        self._batch = [], []
        set_learning_rate(self.engine, learning_rate(config.optimizer.lr, config.schedule, step))
        total = self._loss(self.engine, pairs, texts)
        self.ranks.step_context.start_waiting()  # from here on ranks wait for each other
        self.engine.backward(total * (self.ranks.world_size / totals["tokens"]))
        return Backward(
            losses={"loss": total.detach()[None]},
            engines={"language": self.engine},
            sums=total.detach().double()[None],
            metrics=lambda found: {"loss": found[0].item() / totals["tokens"], **totals},
        )

    def _loss(self, model: Any, pairs: Sequence[EncodedPair], texts: Sequence[Tensor]) -> Tensor:
        """Return the sum of the losses of all predicted ids."""
        return model([pair.ids for pair in pairs], list(texts)).losses.sum()

    def initial_settings(self) -> dict[str, Any]:
        return {
            **model_settings(dict(self.model.config), free=()),
            "seed": self.config.seed,
            "data.batch_size": self.config.data.batch_size,
            "data.index": len(self.pairs),
            "initial_weights": self.initial_weights,
        }

    def largest_step(self) -> LargestStep:
        count = self.config.data.batch_size // self.ranks.world_size
        longest = sorted(self.pairs, key=lambda pair: -len(pair.ids))[:count]
        captions = [" ".join(["caption"] * self.target.num_states)] * count

        def run() -> None:
            forward = in_precision(self.model, self.config.precision, self.ranks.device)
            texts = self.target.states(captions)
            with stand_in_parameters(self.model):
                self._loss(forward, longest, texts).backward()

        return LargestStep(
            what=f"{count} sequences", lower="data.batch_size", settings="data and model", run=run
        )

    def grid(self, step: int, columns: int | None = None) -> None:
        """Return None: `cat-fast dual generate` draws sheets."""

    def evaluate(self) -> dict[str, float] | None:
        """Return bits per id of held-out sequences, with their captions, with others, and of counts."""
        if self.evaluation is None:
            return None
        return self.evaluation.evaluate(self.averaged())

    def close(self) -> None:
        """Do nothing: sequences are in memory."""
