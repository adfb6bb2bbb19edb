"""What a training step costs a rank, by ratio and number of images: c_f(n) = fixed_f + per_image_f * n.

The affine form: one part of a step does not see the batch (the optimiser, the launching of kernels), the
other does the same work image by image. `fit` tells how far the measurements are from it, and keeps them.
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
    """Of a step at one ratio; both parts in the table's unit."""

    fixed: float
    per_image: float

    def __call__(self, images: int) -> float:
        return self.fixed + self.per_image * images

    def images_within(self, budget: float) -> int:
        """The most images that cost no more than `budget`; 0 if not even one fits."""
        # A budget that is itself the cost of n images must give n, whatever the division rounds to.
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
    """Costs by ratio; `unit` is `seconds` where they were measured, `flops` where they were only counted."""

    costs: Mapping[int, Cost]
    unit: str = "seconds"
    measured: Sequence[Measurement] = ()
    fit_error: float = 0.0
    """The largest relative distance of a measurement from the affine form."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, and the machine."""

    def require(self, ratios: Sequence[int]) -> "CostTable":
        """Itself.

        Raises:
            UserError: a ratio is missing.
        """
        if missing := sorted(set(ratios) - set(self.costs)):
            raise UserError(
                f"cost table: it lacks ratio {missing[0]} (it has {', '.join(map(str, self.costs))}); "
                "measure it for this configuration with cat-fast plan cost"
            )
        return self

    def with_facts(self, **facts: Any) -> "CostTable":
        """The same, and more in `about`."""
        return replace(self, about={**self.about, **facts})

    def write(self, path: str | Path) -> None:
        """As JSON, whole or not at all."""
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
        """What `write` wrote.

        Raises:
            UserError: no such file, or no cost table in it.
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
            raise UserError(f"cost table {path}: {error.strerror}; cat-fast plan cost writes one") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"cost table {path}: not what cat-fast plan cost writes ({error!r})") from error
        for ratio, cost in table.costs.items():
            if not (cost.per_image > 0 and cost.fixed >= 0 and math.isfinite(cost.fixed + cost.per_image)):
                raise UserError(f"cost table {path}: {cost} is no cost of ratio {ratio}")
        if not table.costs or table.unit not in UNITS:
            raise UserError(f"cost table {path}: it holds no costs in {' or '.join(UNITS)}")
        return table


def fit(measured: Sequence[Measurement], about: Mapping[str, Any]) -> CostTable:
    """The affine costs nearest to measurements, by least squares of relative errors, ratio by ratio.

    A negative fixed part, which noise can give, is set to 0.

    Raises:
        UserError: a ratio measured with fewer than two numbers of images, or a step that does not take
            longer with more of them.
    """
    costs, worst = {}, 0.0
    for ratio in sorted({one.ratio for one in measured}):
        own = [one for one in measured if one.ratio == ratio]
        n = np.array([one.images for one in own], dtype=float)
        seconds = np.array([one.seconds for one in own])
        if len(set(n)) < 2:
            raise UserError(
                f"cost table: ratio {ratio} needs at least two batch sizes, to tell the fixed part"
            )
        weights = 1 / seconds
        columns = np.stack([np.ones_like(n), n], axis=1)
        fixed, slope = np.linalg.lstsq(columns * weights[:, None], seconds * weights, rcond=None)[0]
        if fixed < 0:
            fixed, slope = 0.0, float((n * weights).sum() / ((n * weights) ** 2).sum())
        if slope <= 0:
            raise UserError(
                f"cost table: at ratio {ratio} a step did not take longer with more images; measure again "
                "with larger batches, or while nothing else runs"
            )
        costs[ratio] = Cost(float(fixed), float(slope))
        worst = max(worst, float(np.abs((fixed + slope * n) * weights - 1).max()))
    return CostTable(costs=costs, measured=tuple(measured), fit_error=worst, about=about)
