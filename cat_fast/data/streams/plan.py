"""Step plan of a stream, for data sets of unknown size: ratio and number of images of each step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cat_fast.data.sampling.step_plan import RankShare, StepPlan
from cat_fast.data.streams.formats.base import Rating, ShardSet, UnreadableShard
from cat_fast.errors import UserError

SHARDS_COUNTED = 16


class PlannedStep(NamedTuple):
    """One rank's share of one step."""

    share: RankShare
    state: dict[str, Any]
    """The plan's state after the step."""


class Mix(NamedTuple):
    """Relative frequency of each ratio."""

    shares: Mapping[int, float]
    """In any unit; normalised by the plan."""
    counted: bool = False
    """True if counted in some of the shards, False if configured."""


class PlanCursor:
    """Iterator over the steps of a plan for one rank; counts the images drawn by all ranks.

    A counted mix is part of the state, since counting again may give another result.

    Args:
        make_plan: returns the plan for a mix of ratios.
    """

    def __init__(self, make_plan: Callable[[Mapping[int, float]], StepPlan], mix: Mix, rank: int) -> None:
        self.make_plan, self.rank = make_plan, rank
        self._set_mix(mix)

    def _set_mix(self, mix: Mix) -> None:
        self.mix, self.plan = mix, self.make_plan(mix.shares)
        self.ratios = sorted(self.plan.shares)
        self.step = 0
        self.drawn = dict.fromkeys(self.ratios, 0)

    def next(self) -> PlannedStep:
        """Return the next step."""
        shares = self.plan.plan(self.step, self.drawn)
        self.step += 1
        for share in shares:
            self.drawn[share.ratio] += share.images
        return PlannedStep(shares[self.rank], self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        state = {"step": self.step, "drawn": {str(ratio): count for ratio, count in self.drawn.items()}}
        if self.mix.counted:
            state["counted"] = {str(ratio): count for ratio, count in self.mix.shares.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume after the step of a `state_dict`.

        Raises:
            UserError: the state is for other ratios.
        """
        if self.mix.counted and "counted" in state:
            self._set_mix(Mix({int(ratio): count for ratio, count in state["counted"].items()}, counted=True))
        saved = sorted(map(int, state["drawn"]))
        if saved != self.ratios:
            raise UserError(f"the checkpoint has the ratios {saved}, the data has {self.ratios}")
        self.step = int(state["step"])
        self.drawn = {ratio: int(state["drawn"][str(ratio)]) for ratio in self.ratios}


def count_mix(shards: ShardSet, rating: Rating, max_shards: int = SHARDS_COUNTED) -> Mix:
    """Count the images of each ratio, using the labels of at most `max_shards` shards spread over the set.

    Raises:
        UserError: the labels contain no ratio.
    """
    found: dict[int, int] = {}
    unreadable = ""
    for index in spread(len(shards.names), max_shards):
        try:
            labels = shards.labels(index) or []
        except UnreadableShard as error:
            unreadable = f"; labels of {shards.names[index]} cannot be read: {error}"
            continue
        for label in labels:
            if (ratio := rating.by_labels(label)) is not None:
                found[ratio] = found.get(ratio, 0) + 1
    if not found:
        raise UserError(
            "sampler.shares: the mix of ratios cannot be counted, because the images have no scores; set it, "
            "for example sampler.shares={8: 0.1, 16: 0.48, 32: 0.42}" + unreadable
        )
    return Mix(dict(sorted(found.items())), counted=True)


def spread(total: int, count: int) -> Sequence[int]:
    """Return `count` evenly spaced numbers below `total`, or all of them if there are fewer."""
    return range(total) if total <= count else [i * total // count for i in range(count)]
