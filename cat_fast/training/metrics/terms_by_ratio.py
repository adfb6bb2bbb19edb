"""A run's latest terms at each ratio, as lines below its progress bar."""

import re
from collections.abc import Mapping

AT_RATIO = re.compile(r"(\w+)_(\d+)x")
"""Name of a metric at one ratio, such as `l1_8x`: the name, and the ratio."""
_ACCURACY = "discriminator_accuracy"
_UNSHOWN = ("real_logit", "fake_logit")


class TermsByRatio:
    """Keeps what was last told of each ratio: a step knows only those that its ranks drew."""

    def __init__(self) -> None:
        self.latest: dict[int, dict[str, float]] = {}

    def update(self, metrics: Mapping[str, float]) -> None:
        """Take over what a step tells of its ratios, unweighted."""
        for name, value in metrics.items():
            if (match := AT_RATIO.fullmatch(name)) and match[1] not in _UNSHOWN:
                self.latest.setdefault(int(match[2]), {})[match[1]] = value

    def lines(self) -> list[str]:
        """One a ratio: `8x: loss 0.31, l1 0.12, gan 0.7, discriminator right 71%`."""
        return [
            f"{ratio}x: {', '.join(_spell(*term) for term in terms.items())}"
            for ratio, terms in sorted(self.latest.items())
        ]


def _spell(name: str, value: float) -> str:
    return f"discriminator right {value:.0%}" if name == _ACCURACY else f"{name} {value:.3g}"
