"""Ratio and number of images of every step, for sets whose images nobody has counted."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cat_fast.data.sampling.step_plan import RankShare, StepPlan
from cat_fast.data.streams.formats.base import Rating, ShardSet, UnreadableShard
from cat_fast.errors import UserError

SHARDS_COUNTED = 16


class Planned(NamedTuple):
    """What one rank trains on in one step."""

    share: RankShare
    state: dict[str, Any]
    """The plan's state after the step."""


class Mix(NamedTuple):
    """How often each ratio comes up."""

    shares: Mapping[int, float]
    """In any unit."""
    counted: bool = False
    """Whether that was counted in a few shards, and not said."""


class PlanCursor:
    """Steps of a plan in order, for one rank; counts what all ranks have drawn.

    A mix that was counted is part of the state: counted again, it might be another.

    Args:
        plan_of: the plan that a mix of ratios gives.
    """

    def __init__(self, plan_of: Callable[[Mapping[int, float]], StepPlan], mix: Mix, rank: int) -> None:
        self.plan_of, self.rank = plan_of, rank
        self._follow(mix)

    def _follow(self, mix: Mix) -> None:
        self.mix, self.plan = mix, self.plan_of(mix.shares)
        self.ratios = sorted(self.plan.shares)
        self.step = 0
        self.drawn = dict.fromkeys(self.ratios, 0)

    def next(self) -> Planned:
        shares = self.plan.plan(self.step, self.drawn)
        self.step += 1
        for share in shares:
            self.drawn[share.ratio] += share.images
        return Planned(shares[self.rank], self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        state = {"step": self.step, "drawn": {str(ratio): count for ratio, count in self.drawn.items()}}
        if self.mix.counted:
            state["counted"] = {str(ratio): count for ratio, count in self.mix.shares.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError if the state is of other ratios."""
        if self.mix.counted and "counted" in state:
            self._follow(Mix({int(ratio): count for ratio, count in state["counted"].items()}, counted=True))
        there = sorted(map(int, state["drawn"]))
        if there != self.ratios:
            raise UserError(f"the checkpoint knows the ratios {there}, the data has {self.ratios}")
        self.step = int(state["step"])
        self.drawn = {ratio: int(state["drawn"][str(ratio)]) for ratio in self.ratios}


def counted(shards: ShardSet, rating: Rating, most: int = SHARDS_COUNTED) -> Mix:
    """Count the images of each ratio by the labels of at most `most` shards, spread over the set.

    Raises:
        UserError: the labels name no ratio.
    """
    found: dict[int, int] = {}
    unreadable = ""
    for index in spread(len(shards.names), most):
        try:
            labels = shards.labels(index) or []
        except UnreadableShard as error:
            unreadable = f"; those of {shards.names[index]} cannot be read: {error}"
            continue
        for label in labels:
            if (ratio := rating.by_labels(label)) is not None:
                found[ratio] = found.get(ratio, 0) + 1
    if not found:
        raise UserError(
            "sampler.shares: the shares of the ratios are not known, as no scores lie beside the images; "
            "say them, such as sampler.shares={8: 0.1, 16: 0.48, 32: 0.42}" + unreadable
        )
    return Mix(dict(sorted(found.items())), counted=True)


def spread(total: int, count: int) -> Sequence[int]:
    """Return `count` of the numbers below `total` at equal distances, or all of them if there are fewer."""
    return range(total) if total <= count else [i * total // count for i in range(count)]
