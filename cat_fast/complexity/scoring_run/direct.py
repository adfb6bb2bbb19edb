"""Scoring of a few texts in memory, such as captions of the command line."""

import time

import numpy as np

from cat_fast.complexity.ratios.thresholds import RatioThresholds
from cat_fast.complexity.score import Scorer
from cat_fast.complexity.scoring_run.decision import TOKENS, decide, require_enough
from cat_fast.complexity.scoring_run.inputs import Inputs
from cat_fast.complexity.scoring_run.keys import KeysSeen
from cat_fast.complexity.scoring_run.outputs import ScoreSettings
from cat_fast.complexity.scoring_run.rows import Row, RowScorer, ScoringResult, mark_repeated


def score_directly(
    inputs: Inputs, scorer: Scorer, thresholds: RatioThresholds, mean_tokens: float | None = None
) -> tuple[ScoringResult, list[Row]]:
    """Return the result of scoring all samples, and their rows with ratio and tokens (`score_file`).

    Raises:
        UserError: the budget is too small, or the scorer cannot work at all.
    """
    require_enough(mean_tokens)
    settings = ScoreSettings.of(scorer, thresholds, mean_tokens)
    start = time.perf_counter()
    row_scorer, seen = RowScorer(scorer, settings), KeysSeen()
    rows = row_scorer.score([sample for found in inputs for sample in mark_repeated(found.samples(), seen)])
    scored = [row for row in rows if row["error"] is None]
    scores = np.array([row["score"] for row in scored], dtype=np.int32)
    expected = np.array([row["expected"] for row in scored], dtype=np.float64)
    for row, ratio in zip(scored, decide(scores, expected, thresholds, mean_tokens).tolist(), strict=True):
        row |= {"ratio": ratio, "tokens": TOKENS[ratio]}
    result = ScoringResult(
        settings,
        seconds=time.perf_counter() - start,
        rows=len(rows),
        scored=row_scorer.scored,
        failed=len(rows) - len(scored),
        problems=list(inputs.problems),
    )
    return result, [{"ratio": None, "tokens": None} | row for row in rows]
