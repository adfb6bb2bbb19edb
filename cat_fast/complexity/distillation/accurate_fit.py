"""Fit of the accurate scorer: adapters, the kernel regression and the calibration.

Each adapter leaves out its own part of the captions, as each network of the fast scorer does. The calibration
is fitted to predictions of these parts alone, so that a fit needs no captions other than its own.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cat_fast.complexity.description import Description
from cat_fast.complexity.distillation.adapter_training import (
    HiddenCaptions,
    TrainingPlan,
    predict_states,
    train_adapter,
)
from cat_fast.complexity.distillation.fast_fit import PARTS, assign_parts
from cat_fast.complexity.distillation.kernel_fit import WIDTH, fit_kernel_model
from cat_fast.complexity.rated_captions import RatedCaption
from cat_fast.complexity.scorers.accurate.calibration import Calibration, RawPredictions, StatePredictions
from cat_fast.complexity.scorers.accurate.encoding import encode
from cat_fast.complexity.scorers.accurate.kernel_model import FeatureMap
from cat_fast.complexity.scorers.accurate.rating_model import RatingModel
from cat_fast.complexity.scorers.accurate.scorer import AccurateScorer
from cat_fast.complexity.scorers.fast.scorer import FastScorer
from cat_fast.complexity.sentence_encoder import FILES, SentenceEncoder
from cat_fast.data.files import atomic_write

MEMBERS = 2
"""Number of adapters."""


@dataclass(frozen=True)
class EncodedCaptions:
    """Rated captions with their encodings, which all fits share."""

    encoder: SentenceEncoder
    rated: Sequence[RatedCaption]
    hidden: HiddenCaptions
    pooled: np.ndarray
    """float32 (N, K)."""

    @classmethod
    def compute(
        cls,
        encoder: SentenceEncoder,
        rated: Sequence[RatedCaption],
        on_caption: Callable[[int], None] = lambda finished: None,
    ) -> "EncodedCaptions":
        """Encode all captions; `on_caption` is called with the number of encoded ones."""
        states: list[torch.Tensor] = [torch.empty(0)] * len(rated)
        pooled: list[np.ndarray] = [np.empty(0)] * len(rated)
        finished = 0
        for batch in encode(encoder, [row.description.caption for row in rated]):
            for row, i in enumerate(batch.indices):
                states[i] = batch.hidden[row, batch.real[row]].clone()
                pooled[i] = batch.pooled[row].numpy()
            finished += len(batch.indices)
            on_caption(finished)
        return cls(encoder, rated, HiddenCaptions.join(states), np.stack(pooled))


def training_steps(encoded: EncodedCaptions, rows: np.ndarray, plan: TrainingPlan) -> int:
    """Return the number of training steps of `fit_accurate`."""
    single = sum(len(encoded.rated[i].ratings) == 1 for i in rows)
    kept = (PARTS - 1) / PARTS
    per_epoch = (len(rows) - single) * kept + min(single * kept, plan.single_rating_rows)
    return MEMBERS * plan.epochs * -(-int(per_epoch) // plan.batch_size)


def fit_accurate(
    encoded: EncodedCaptions,
    rows: np.ndarray,
    fast: FastScorer,
    *,
    plan: TrainingPlan,
    folder: Path,
    on_step: Callable[[], None] = lambda: None,
) -> AccurateScorer:
    """Fit the scorer to the captions `rows`; the same arguments give the same scorer.

    Args:
        encoded: all rated captions.
        rows: indices of the captions to fit.
        fast: the fast scorer, fitted to the same captions by `fit_fast`.
        plan: settings of the adapters' training.
        folder: folder of finished adapters, which are not trained again.
        on_step: is called after every training step.
    """
    subset = [encoded.rated[i] for i in rows]
    parts = assign_parts(subset)
    double = np.array([len(row.ratings) > 1 for row in subset])
    features = FeatureMap.fit(encoded.pooled[rows], WIDTH)
    models: list[RatingModel] = []
    left_out: list[int] = []
    raw: tuple[list[RawPredictions], list[RawPredictions]] = ([], [])
    for member in range(MEMBERS):
        path = folder / f"adapter-{_fingerprint(encoded, rows, plan, member)}.safetensors"
        kept, part = np.flatnonzero(parts != member), np.flatnonzero((parts == member) & double)
        models.append(_trained(path, encoded, rows[kept], plan, member, on_step))
        kernel = fit_kernel_model(features, encoded.pooled[rows[kept]], [subset[i] for i in kept])
        found = StatePredictions(
            *predict_states(models[-1], encoded.hidden, rows[part]),
            kernel.predict(encoded.pooled[rows[part]]).astype(np.float64),
        )
        words = replace(fast, networks=fast.networks[member : member + 1])
        given = [subset[i].description for i in part]
        for state, descriptions in enumerate((given, [Description(d.caption) for d in given])):
            raw[state].append(found.resolve(descriptions, words.predict(descriptions)[0]))
        left_out += part.tolist()
    means = np.array([subset[i].mean for i in left_out])
    known, unknown = (Calibration.fit(RawPredictions.join(members), means) for members in raw)
    adapters = [{name: value.half() for name, value in model.adapter().items()} for model in models]
    kernel = fit_kernel_model(features, encoded.pooled[rows], subset)
    return AccurateScorer(encoded.encoder, adapters, kernel, fast, (known, unknown))


def _trained(
    path: Path,
    encoded: EncodedCaptions,
    rows: np.ndarray,
    plan: TrainingPlan,
    seed: int,
    on_step: Callable[[], None],
) -> RatingModel:
    if path.exists():
        model = RatingModel(encoded.encoder)
        model.load_adapter({name: value.float() for name, value in load_file(path).items()})
        return model.eval()
    model = train_adapter(
        encoded.encoder, encoded.rated, encoded.hidden, rows, plan=plan, seed=seed, on_step=on_step
    )
    with atomic_write(path) as part:
        save_file({name: value.half().contiguous() for name, value in model.adapter().items()}, part)
    return model


def _fingerprint(encoded: EncodedCaptions, rows: np.ndarray, plan: TrainingPlan, member: int) -> str:
    """Hash everything that an adapter depends on, except this code."""
    data = [
        (r.description.caption, r.ratings, r.description.has_text, r.description.has_faces)
        for r in encoded.rated
    ]
    content = json.dumps([asdict(plan), member, PARTS, rows.tolist(), data, FILES])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
