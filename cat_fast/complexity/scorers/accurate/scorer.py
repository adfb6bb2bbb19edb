"""The accurate scorer, packaged with the library; its encoder comes from another package.

See `cat_fast.complexity.distillation.accurate_fit` for the fit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from cat_fast.complexity.array_file import read_arrays, save_arrays, version_of
from cat_fast.complexity.calibration import Boundaries
from cat_fast.complexity.contributions import contributions
from cat_fast.complexity.description import Description
from cat_fast.complexity.score import Score, ScoringFailure
from cat_fast.complexity.scorers.accurate.calibration import Calibration, RawPredictions, StatePredictions
from cat_fast.complexity.scorers.accurate.encoding import encode
from cat_fast.complexity.scorers.accurate.kernel_model import FeatureMap, KernelModel
from cat_fast.complexity.scorers.accurate.rating_model import RatingModel
from cat_fast.complexity.scorers.fast.scorer import FAST_FILE, FastScorer
from cat_fast.complexity.sentence_encoder import FILES, SentenceEncoder
from cat_fast.errors import UserError
from cat_fast.kernels.linear.layer import Linear

ACCURATE_FILE = FAST_FILE.with_name("accurate_scorer.npz")
"""The packaged scorer, next to the fast one, which it contains by reference."""
_FEATURE_ARRAYS = ("center", "spread", "projection", "scale")


@dataclass(frozen=True)
class AccurateScorer:
    """Mean of an adapted sentence encoder, a kernel regression on the frozen one, and the fast scorer.

    Scores depend on the description alone: not on the other descriptions of a call nor their order.
    """

    encoder: SentenceEncoder
    adapters: Sequence[Mapping[str, torch.Tensor]]
    """Trained parameters of `RatingModel`s, whose probabilities are averaged; float16."""
    kernel: KernelModel
    fast: FastScorer
    calibrations: tuple[Calibration, Calibration]
    """With both flags given, and otherwise."""

    name: ClassVar[str] = "accurate"

    @classmethod
    def load(cls, path: Path | None = None) -> "AccurateScorer":
        """Load the scorer at `path`, by default the packaged one.

        Raises:
            UserError: the file is missing or does not contain a scorer; the fast scorer next to it, or the
                encoder's package, is missing or differs from the one of the fit.
        """
        path = ACCURATE_FILE if path is None else path
        (kernel, calibrations, adapters), version = read_arrays(
            path, "accurate scorer", lambda arrays: (_parse(arrays), str(arrays["fast_version"].item()))
        )
        fast = FastScorer.load(path.with_name(FAST_FILE.name))
        if fast.version != version:
            raise UserError(
                f"{path}: fitted with version {version} of the fast scorer, found {fast.version} next to it;"
                " fit it again with cat-fast score distill --tier accurate"
            )
        scorer = cls(SentenceEncoder.load(), adapters, kernel, fast, calibrations)
        try:
            _ = scorer._models
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}: the adapter does not fit the encoder ({error})") from error
        return scorer

    def save(self, path: Path) -> None:
        """Save everything but the encoder as plain arrays (npz, no pickle), the fast scorer next to it."""
        self.fast.save(path.with_name(FAST_FILE.name))
        save_arrays(path, self._arrays())

    @cached_property
    def version(self) -> str:
        """Hash of the scorer's arrays and the encoder's weights."""
        return version_of(self._arrays(), start=FILES["model.safetensors"])

    @property
    def linears(self) -> list[Linear]:
        """Linear maps of the encoder and of its adapted layers, whose products are most of the work."""
        parts = [self.encoder.layers, *(model.layers for model in self._models)]
        return [module for part in parts for module in part.modules() if isinstance(module, Linear)]

    def score_many(self, descriptions: Sequence[Description]) -> list[Score | ScoringFailure]:
        """Score each description, in order."""
        raw, known = self.predict(descriptions), _known(descriptions)
        columns = [
            np.where(known, *(getattr(calibration, name)(raw) for calibration in self.calibrations)).tolist()
            for name in ("expected", "confidences")
        ]
        return [Score.of_expected(*row) for row in zip(*columns, strict=True)]

    def predict(self, descriptions: Sequence[Description]) -> RawPredictions:
        """Return the predictions of all parts before calibration, in order."""
        if not descriptions:
            return RawPredictions(np.zeros((0, 9)), np.zeros(0), np.zeros(0))
        fast, _, _ = self.fast.predict(descriptions)
        return self._predict_states([d.caption for d in descriptions]).resolve(descriptions, fast)

    def contributions(self, description: Description) -> list[tuple[str, float]]:
        """Return the effects of words and flags, largest magnitude first; see `contributions`."""
        return contributions(self, description)

    @torch.no_grad()
    def _predict_states(self, captions: Sequence[str]) -> StatePredictions:
        count, members = len(captions), len(self._models)
        found = StatePredictions(np.zeros((count, 4, 9)), np.zeros((count, 2)), np.zeros((count, 6)))
        for batch in encode(self.encoder, captions):
            at, n = batch.indices, len(batch.indices)
            for model in self._models:
                ratings, flags = model.predict(batch.hidden, batch.real)
                found.ratings[at] += ratings[:n].numpy() / members
                found.flags[at] += flags[:n].numpy() / members
            found.kernel[at] = self.kernel.predict(batch.pooled.numpy())[:n]
        return found

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
            "fast_version": np.array(self.fast.version),
            "boundaries": np.array([(c.boundaries.low, c.boundaries.high) for c in self.calibrations]),
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
        Calibration(Boundaries(*map(float, row)), confidence)
        for row, confidence in zip(arrays["boundaries"], arrays["confidence"], strict=True)
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
