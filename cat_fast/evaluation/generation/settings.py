"""Settings of an evaluation of generated images."""

from dataclasses import dataclass, field
from pathlib import Path

from cat_fast.errors import UserError
from cat_fast.evaluation.features.loading import NETWORKS

METRICS = ("fid", "sfid", "is", "pr", "kid", "fd-dinov2")
FRECHET_OUTPUTS = {"fid": "pool", "sfid": "spatial", "fd-dinov2": "pool"}
"""Output of the network that a Fréchet distance compares, by metric."""
PROXY_METRICS = ("fid", "pr", "kid")
"""Metrics of `--features proxy`, whose trunk has neither a classifier nor sFID's layer."""
ROUNDINGS = {
    "nearest": "round((x + 1) / 2 · 255)",
    "adm": "floor(clip(127.5 x + 128)), as in ADM, DiT and EDM",
    "truncate": "floor((x + 1) / 2 · 255)",
    "unknown": "unknown",
}
"""How samples in [-1, 1] became bytes, by name."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Metrics, networks and protocol.

    Raises:
        UserError: an unknown or unavailable metric, or an unknown rounding.
    """

    metrics: tuple[str, ...] = ()
    """Subset of `METRICS`; empty selects all but FD-DINOv2, or all that the proxy has."""
    proxy: bool = False
    """Compare features of an offline trunk, under names that begin with `proxy-`."""
    weights: dict[str, Path] = field(default_factory=dict)
    """Files or folders of weights, by network."""
    pr_network: str = "inception"
    """Network of precision and recall: `inception`, as in ADM and the published tables, or `vgg16`."""
    k: int = 3
    """Neighbour that spheres of precision and recall reach."""
    references: int = 10_000
    """Number of reference images for precision, recall and KID, as in ADM."""
    kid_samples: int = 5_000
    """Maximum number of samples for KID, which needs all pairs."""
    rounding: str = "unknown"
    """How the samples became bytes, one of `ROUNDINGS`."""
    images_as_statistics: bool = False
    """Allow FID against the few images of a reference file without statistics."""
    allow_few: bool = False
    """Allow fewer images than features."""
    batch_size: int = 32
    seed: int = 0
    """Seed of subsets of references and samples."""

    def __post_init__(self) -> None:
        known = PROXY_METRICS if self.proxy else METRICS
        for metric in self.metrics:
            if metric not in METRICS:
                raise UserError(f"--metrics {metric}: expected {', '.join(METRICS)}")
            if metric not in known:
                raise UserError(
                    f"--metrics {metric}: not available with --features proxy; expected {', '.join(known)}"
                )
        if self.rounding not in ROUNDINGS:
            raise UserError(f"--rounding {self.rounding}: expected {', '.join(ROUNDINGS)}")
        if self.pr_network not in ("inception", "vgg16"):
            raise UserError(f"--pr-features {self.pr_network}: expected inception or vgg16")
        for name in self.weights:
            if name not in NETWORKS:
                raise UserError(f"--weights {name}=...: expected {', '.join(NETWORKS)}")

    @property
    def chosen(self) -> tuple[str, ...]:
        """Metrics to compute, in the order of `METRICS`."""
        default = PROXY_METRICS if self.proxy else METRICS[:-1]
        return tuple(metric for metric in METRICS if metric in (self.metrics or default))

    def network_of(self, metric: str) -> str:
        """Return the network that a metric compares features of."""
        if self.proxy:
            return "proxy"
        if metric == "pr":
            return self.pr_network
        return "dinov2" if metric == "fd-dinov2" else "inception"
