"""Cost of a training step on one rank, by ratio and number of images: c_f(n) = fixed_f + per_image_f * n.

The fixed part does not depend on the batch (optimiser, kernel launches); the other is proportional to the
number of images. `fit` records the measurements and their largest deviation from this form.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cat_fast.data.files import atomic_write
from cat_fast.errors import UserError

UNITS = ("seconds", "flops")


@dataclass(frozen=True)
class Cost:
    """Cost of a step at one ratio, in the table's unit."""

    fixed: float
    per_image: float

    def __call__(self, images: int) -> float:
        return self.fixed + self.per_image * images

    def images_within(self, budget: float) -> int:
        """Return the largest number of images with a cost of at most `budget`; 0 if one exceeds it."""
        # A budget equal to the cost of n images must give n despite rounding.
        return max(0, math.floor((budget - self.fixed) / self.per_image + 1e-9))


@dataclass(frozen=True)
class Measurement:
    """Seconds of one training step with `images` images at `ratio`: median and quartiles of `repeats`."""

    ratio: int
    images: int
    seconds: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """Costs by ratio; `unit` is `seconds` for measured and `flops` for counted costs."""

    costs: Mapping[int, Cost]
    unit: str = "seconds"
    measured: Sequence[Measurement] = ()
    fit_error: float = 0.0
    """Largest relative deviation of a measurement from the affine form."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Description of the measured configuration and of the machine."""

    def require(self, ratios: Sequence[int]) -> "CostTable":
        """Return the table if it has all of `ratios`.

        Raises:
            UserError: a ratio is missing.
        """
        if missing := sorted(set(ratios) - set(self.costs)):
            raise UserError(
                f"cost table: ratio {missing[0]} is missing (it has {', '.join(map(str, self.costs))}); "
                "measure it for this configuration with cat-fast plan cost"
            )
        return self

    def with_facts(self, **facts: Any) -> "CostTable":
        """Return a copy with more entries in `about`."""
        return replace(self, about={**self.about, **facts})

    def write(self, path: str | Path) -> None:
        """Write the table as JSON, atomically."""
        values = {
            "unit": self.unit,
            "costs": {str(f): asdict(cost) for f, cost in sorted(self.costs.items())},
            "fit_error": self.fit_error,
            "measured": [asdict(one) for one in self.measured],
            "about": dict(self.about),
        }
        with atomic_write(path) as part:
            part.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> "CostTable":
        """Read a table written by `write`.

        Raises:
            UserError: the file is missing or not a valid cost table.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            table = cls(
                costs={
                    int(f): Cost(**{k: float(v) for k, v in c.items()}) for f, c in values["costs"].items()
                },
                unit=values["unit"],
                measured=tuple(Measurement(**one) for one in values.get("measured", ())),
                fit_error=float(values.get("fit_error", 0.0)),
                about=values.get("about", {}),
            )
        except OSError as error:
            raise UserError(f"cost table {path}: {error.strerror}; run cat-fast plan cost first") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"cost table {path}: expected the output of cat-fast plan cost ({error!r})"
            ) from error
        for ratio, cost in table.costs.items():
            if not (cost.per_image > 0 and cost.fixed >= 0 and math.isfinite(cost.fixed + cost.per_image)):
                raise UserError(f"cost table {path}: invalid cost of ratio {ratio}: {cost}")
        if not table.costs or table.unit not in UNITS:
            raise UserError(f"cost table {path}: expected costs in {' or '.join(UNITS)}")
        return table


def fit(measured: Sequence[Measurement], about: Mapping[str, Any]) -> CostTable:
    """Fit affine costs to measurements, per ratio, by least squares of relative errors.

    A negative fixed part, which noise can cause, is set to 0.

    Raises:
        UserError: a ratio was measured with fewer than two batch sizes, or its steps do not take longer with
            larger batches.
    """
    costs, worst = {}, 0.0
    for ratio in sorted({one.ratio for one in measured}):
        own = [one for one in measured if one.ratio == ratio]
        n = np.array([one.images for one in own], dtype=float)
        seconds = np.array([one.seconds for one in own])
        if len(set(n)) < 2:
            raise UserError(f"cost table: ratio {ratio} needs at least two batch sizes to fit the fixed part")
        weights = 1 / seconds
        columns = np.stack([np.ones_like(n), n], axis=1)
        fixed, slope = np.linalg.lstsq(columns * weights[:, None], seconds * weights, rcond=None)[0]
        if fixed < 0:
            fixed, slope = 0.0, float((n * weights).sum() / ((n * weights) ** 2).sum())
        if slope <= 0:
            raise UserError(
                f"cost table: at ratio {ratio} a step did not take longer with more images; measure again "
                "with larger batches, or on an idle machine"
            )
        costs[ratio] = Cost(float(fixed), float(slope))
        worst = max(worst, float(np.abs((fixed + slope * n) * weights - 1).max()))
    return CostTable(costs=costs, measured=tuple(measured), fit_error=worst, about=about)
