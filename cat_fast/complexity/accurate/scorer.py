"""The accurate scorer, packaged with the library; its encoder comes from another package.

See `cat_fast.complexity.distillation` for how it is fitted.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from cat_fast.complexity.accurate.calibration import Calibration, RawPredictions
from cat_fast.complexity.accurate.encoding import encode
from cat_fast.complexity.accurate.kernel_model import FeatureMap, KernelModel, mix_states
from cat_fast.complexity.accurate.rating_model import RatingModel, flag_states
from cat_fast.complexity.description import Description
from cat_fast.complexity.score import Score, ScoringFailure
from cat_fast.complexity.sentence_encoder import FILES, SentenceEncoder
from cat_fast.data.files import atomic_write
from cat_fast.errors import UserError

ACCURATE_FILE = Path(__file__).parents[1] / "assets" / "accurate_scorer.npz"
"""The packaged scorer."""
_FEATURE_ARRAYS = ("center", "spread", "projection", "scale")
EXPLAINED_WORDS = 60
"""Number of words of a caption whose effect is computed."""


@dataclass(frozen=True)
class AccurateScorer:
    """Mean of an adapted sentence encoder's expected rating and a kernel regression, calibrated.

    Scores depend on the description alone: not on the other descriptions of a call nor their order.
    """

    encoder: SentenceEncoder
    adapters: Sequence[Mapping[str, torch.Tensor]]
    """Trained parameters of `RatingModel`s, whose probabilities are averaged; float16."""
    kernel: KernelModel
    calibrations: tuple[Calibration, Calibration]
    """With both flags given, and otherwise."""

    name: ClassVar[str] = "accurate"

    @classmethod
    def load(cls, path: Path | None = None) -> "AccurateScorer":
        """Load the scorer at `path`, by default the packaged one.

        Raises:
            UserError: the file is missing or does not contain a scorer, or the encoder's package is missing
                or differs from the one of the fit.
        """
        path = ACCURATE_FILE if path is None else path
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            kernel, calibrations, adapters = _parse(arrays)
        except FileNotFoundError:
            raise UserError(f"{path}: the file is missing; create it with cat-fast score distill") from None
        except (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"{path}: not a file of the accurate scorer ({error}); create one with cat-fast score distill"
            ) from error
        scorer = cls(SentenceEncoder.load(), adapters, kernel, calibrations)
        try:
            _ = scorer._models
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}: the adapter does not fit the encoder ({error})") from error
        return scorer

    def save(self, path: Path) -> None:
        """Save everything but the encoder atomically as plain arrays (npz, no pickle)."""
        with atomic_write(path) as part, part.open("wb") as file:
            np.savez_compressed(file, **self._arrays())

    @cached_property
    def version(self) -> str:
        """Hash of the scorer's arrays and the encoder's weights."""
        digest = hashlib.sha256(FILES["model.safetensors"].encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        return digest.hexdigest()[:12]

    def score_many(self, descriptions: Sequence[Description]) -> list[Score | ScoringFailure]:
        """Score each description, in order."""
        raw, known = self.predict(descriptions), _known(descriptions)
        columns = [
            np.where(known, *(getattr(calibration, name)(raw) for calibration in self.calibrations)).tolist()
            for name in ("expected", "confidences")
        ]
        return [Score.of_expected(*row) for row in zip(*columns, strict=True)]

    def expected(self, descriptions: Sequence[Description]) -> np.ndarray:
        """Return the expected score of each description, in order, float64 (N,)."""
        raw = self.predict(descriptions)
        return np.where(_known(descriptions), *(c.expected(raw) for c in self.calibrations))

    @torch.no_grad()
    def predict(self, descriptions: Sequence[Description]) -> RawPredictions:
        """Return the predictions of both parts before calibration, in order."""
        ratings, kernel = np.zeros((len(descriptions), 9)), np.zeros((len(descriptions), 6))
        states = flag_states(descriptions)
        for batch in encode(self.encoder, [d.caption for d in descriptions]):
            at, n = batch.indices, len(batch.indices)
            flags = torch.zeros(len(batch.real), 2, dtype=torch.int64)
            flags[:n] = states[at]
            for model in self._models:
                logits = model.ratings(model.pool(batch.hidden, batch.real), flags)
                ratings[at] += logits[:n].double().softmax(1).numpy() / len(self._models)
            kernel[at] = self.kernel.predict(batch.pooled.numpy())[:n]
        return RawPredictions(ratings, mix_states(kernel, descriptions))

    def contributions(self, description: Description) -> list[tuple[str, float]]:
        """Return (word or flag, change of the expected score by it) pairs, largest magnitude first.

        A word's change is against the caption without it, a given flag's against the flag unknown.
        """
        words = description.caption.split()[:EXPLAINED_WORDS]
        rest = description.caption.split()[EXPLAINED_WORDS:]
        changed = {
            f'word "{word}"': replace(description, caption=" ".join(words[:i] + words[i + 1 :] + rest))
            for i, word in enumerate(words)
            if len(words) > 1
        }
        if description.has_text is not None:
            changed["has text"] = replace(description, has_text=None)
        if description.has_faces is not None:
            changed["has faces"] = replace(description, has_faces=None)
        expected, *others = self.expected([description, *changed.values()]).tolist()
        effects = [(name, expected - other) for name, other in zip(changed, others, strict=True)]
        return sorted(effects, key=lambda effect: -abs(effect[1]))

    @cached_property
    def _models(self) -> list[RatingModel]:
        models = []
        for adapter in self.adapters:
            model = RatingModel(self.encoder)
            model.load_adapter({name: value.float() for name, value in adapter.items()})
            models.append(model.merge())
        return models

    def _arrays(self) -> dict[str, Any]:
        features = self.kernel.features
        arrays = {
            **{name: getattr(features, name) for name in _FEATURE_ARRAYS},
            "landmarks": self.kernel.landmarks,
            "weights": self.kernel.weights,
            "intercepts": self.kernel.intercepts,
            "boundaries": np.stack([c.boundaries for c in self.calibrations]),
            "confidence": np.stack([c.confidence for c in self.calibrations]),
        }
        for i, adapter in enumerate(self.adapters):
            arrays |= {f"adapter{i}/{name}": value.half().numpy() for name, value in adapter.items()}
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _known(descriptions: Sequence[Description]) -> np.ndarray:
    """Return True for descriptions with both flags, bool (N,)."""
    return np.array([None not in (d.has_text, d.has_faces) for d in descriptions], dtype=bool)


def _parse(
    arrays: Mapping[str, np.ndarray],
) -> tuple[KernelModel, tuple[Calibration, Calibration], list[dict[str, torch.Tensor]]]:
    features = FeatureMap(*(arrays[name] for name in _FEATURE_ARRAYS))
    kernel = KernelModel(features, *(arrays[name] for name in ("landmarks", "weights", "intercepts")))
    known, unknown = (
        Calibration(*row) for row in zip(arrays["boundaries"], arrays["confidence"], strict=True)
    )
    adapters: dict[str, dict[str, torch.Tensor]] = {}
    for name, array in arrays.items():
        if name.startswith("adapter"):
            member, _, parameter = name.partition("/")
            adapters.setdefault(member, {})[parameter] = torch.from_numpy(array)
    if not adapters:
        raise KeyError("adapter0")
    return kernel, (known, unknown), list(adapters.values())


@cache
def accurate_scorer() -> AccurateScorer:
    """Return the packaged scorer, loaded once."""
    return AccurateScorer.load()
