"""Ratios and tokens of scored samples: by thresholds, or within a budget over all samples."""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow

from cat_fast.complexity.budget import ratios_within_budget
from cat_fast.complexity.ratio import RATIOS, RatioThresholds, tokens_per_image
from cat_fast.complexity.scoring_run.score_file import SCHEMA
from cat_fast.data.images.label_fields import SCORES

RESOLUTION, PATCH_SIZE = 512, 2
"""Images that the tokens are for."""
_TOKENS = np.zeros(max(RATIOS) + 1, dtype=np.int32)
_TOKENS[list(RATIOS)] = [tokens_per_image(ratio, RESOLUTION, PATCH_SIZE) for ratio in RATIOS]


def require_budget(mean_tokens: float | None) -> None:
    """Raise UserError if a budget of mean tokens is too small for a sample."""
    if mean_tokens is not None:
        ratios_within_budget([1.0], mean_tokens, resolution=RESOLUTION, patch_size=PATCH_SIZE)


def with_ratios(
    tables: Callable[[], Iterator[pyarrow.Table]], thresholds: RatioThresholds, mean_tokens: float | None
) -> Iterator[pyarrow.Table]:
    """Yield tables of `PART_SCHEMA` with their ratios and tokens added, as tables of `SCHEMA`.

    Args:
        tables: returns the tables; with a budget they are read twice.
        mean_tokens: budget that the mean tokens of all scored samples come as close to as possible without
            exceeding it (`ratios_within_budget`, on the expected scores); None to use `thresholds` alone.
    """
    by_score = np.zeros(SCORES[-1] + 1, dtype=np.int32)
    by_score[list(SCORES)] = thresholds.ratios(SCORES)
    budgeted: np.ndarray | None = None
    if mean_tokens is not None:
        scored = [table.filter(table["score"].is_valid()) for table in tables()]
        expected = np.concatenate([np.zeros(0), *(table["expected"].to_numpy() for table in scored)])
        scores = np.concatenate([np.zeros(0, np.int32), *(table["score"].to_numpy() for table in scored)])
        budgeted = np.array(
            ratios_within_budget(
                expected.tolist(),
                mean_tokens,
                resolution=RESOLUTION,
                patch_size=PATCH_SIZE,
                preferred=by_score[scores].tolist(),
            ),
            dtype=np.int32,
        )
    done = 0
    for table in tables():
        missing = table["score"].is_null().to_numpy()
        if budgeted is None:
            ratios = by_score[table["score"].fill_null(0).to_numpy()]
        else:
            ratios = np.zeros(len(table), dtype=np.int32)
            count = int((~missing).sum())
            ratios[~missing] = budgeted[done : done + count]
            done += count
        columns = {"ratio": ratios, "tokens": _TOKENS[ratios]}
        for name, values in columns.items():
            table = table.append_column(name, pyarrow.array(values, mask=missing))
        yield table.select(SCHEMA.names).cast(SCHEMA)
