"""Latest loss terms per ratio, as lines below the progress bar."""

import re
from collections.abc import Mapping

AT_RATIO = re.compile(r"(\w+)_(\d+)x")
"""Metric at one ratio, such as `l1_8x`; the groups are its name and the ratio."""
_ACCURACY = "discriminator_accuracy"
_UNSHOWN = ("real_logit", "fake_logit")


class TermsByRatio:
    """Latest value of each metric per ratio; a step reports only the ratios that its ranks drew."""

    def __init__(self) -> None:
        self.latest: dict[int, dict[str, float]] = {}

    def update(self, metrics: Mapping[str, float]) -> None:
        """Store a step's unweighted metrics per ratio."""
        for name, value in metrics.items():
            if (match := AT_RATIO.fullmatch(name)) and match[1] not in _UNSHOWN:
                self.latest.setdefault(int(match[2]), {})[match[1]] = value

    def lines(self) -> list[str]:
        """Return one line per ratio: `8x: loss 0.31, l1 0.12, gan 0.7, discriminator accuracy 71%`."""
        return [
            f"{ratio}x: {', '.join(_format_term(*term) for term in terms.items())}"
            for ratio, terms in sorted(self.latest.items())
        ]


def _format_term(name: str, value: float) -> str:
    return f"discriminator accuracy {value:.0%}" if name == _ACCURACY else f"{name} {value:.3g}"
