"""Evaluation of generated images: features once per network, then the figures, then one JSON result."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cat_fast.data.files import write_json
from cat_fast.errors import UserError
from cat_fast.evaluation.distances.frechet import frechet_distance
from cat_fast.evaluation.distances.inception_score import SPLITS, inception_score
from cat_fast.evaluation.distances.kernel import kernel_distance
from cat_fast.evaluation.distances.neighbours import precision_recall
from cat_fast.evaluation.distances.statistics import Gaussian
from cat_fast.evaluation.features.loading import LoadedNetwork, load_network
from cat_fast.evaluation.generation import checks
from cat_fast.evaluation.generation.reference import Reference, draw_numbers, gaussian_of, stored_gaussian
from cat_fast.evaluation.generation.settings import FRECHET_OUTPUTS, ROUNDINGS, GenerationSettings
from cat_fast.evaluation.images.feature_files import FeatureFiles
from cat_fast.evaluation.images.sets import ImageSet
from cat_fast.evaluation.provenance import machine, split_of, versions

RESULT = "generation.json"
OnProgress = Callable[[str, int, int], None]
"""Called with a name, the amount done since the last call, and the total of that name."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A finished evaluation."""

    result: dict[str, Any]
    left_out: int
    """Number of samples and references that could not be used."""


def evaluate_generation(
    samples: ImageSet,
    reference: Reference,
    settings: GenerationSettings,
    out: Path,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    extra: Mapping[str, Any] | None = None,
    on_progress: OnProgress = lambda name, done, total: None,
) -> Evaluation | None:
    """Evaluate samples against a reference; write `out`/generation.json.

    Features are kept in `out`/features, from which an interrupted evaluation resumes.

    Args:
        rank, world_size: share of the features that this machine computes.
        extra: further entries of the result, such as the pipeline's settings.

    Returns:
        None if other machines have not computed all features yet.

    Raises:
        UserError: a comparison that gives wrong figures (`checks`), missing weights, or unusable images.
    """
    checks.check_samples(samples)
    checks.check_sizes(samples, reference)
    checks.check_statistics_source(reference, settings)
    started = time.perf_counter()
    names = list(dict.fromkeys(map(settings.network_of, settings.chosen)))
    networks = {name: load_network(name, settings.weights.get(name), device) for name in names}
    _check_outputs(reference, networks, settings)
    ours = {
        name: FeatureFiles(out / "features" / f"samples-{name}", samples, networks[name]) for name in names
    }
    theirs = {
        name: FeatureFiles(out / "features" / f"reference-{name}", reference.images, networks[name])
        for name in names
        if reference.images is not None and _needs_images(name, reference, settings)
    }
    for kind, files in (("samples", ours), ("reference", theirs)):
        for name, one in files.items():
            label = f"{kind}, {name}"
            total = one.images.count
            one.extract(
                settings.batch_size,
                device,
                rank,
                world_size,
                lambda count, label=label, total=total: on_progress(label, count, total),  # type: ignore[misc]
            )
    if any(one.missing() for one in (*ours.values(), *theirs.values())):
        return None
    extracted = time.perf_counter()
    figures = _Figures(settings, reference, networks, ours, theirs)
    metrics: dict[str, Any] = {}
    for metric in settings.chosen:
        on_progress(metric, 0, 1)
        metrics |= figures.compute(metric)
        on_progress(metric, 1, 1)
    skipped = {
        kind: sorted({entry for one in files.values() for entry in one.skipped()})
        for kind, files in (("samples", ours), ("reference", theirs))
    }
    used = samples.count - len(skipped["samples"])
    record = samples.record()
    result = {
        "evaluation": "generation",
        "metrics": metrics,
        "samples": record
        | {
            "used": used,
            "rounding": ROUNDINGS[settings.rounding],
            "skipped": [entry._asdict() for entry in skipped["samples"]],
        },
        "reference": reference.record()
        | {
            "split": split_of(reference.path),
            "skipped": [entry._asdict() for entry in skipped["reference"]],
        },
        "networks": {name: network.record() for name, network in networks.items()},
        "protocol": _protocol(settings, figures),
        "deviations": checks.deviations(
            used, record.get("formats", ()), reference.record(), settings, figures.references
        ),
        **(extra or {}),
        "versions": versions(),
        "timing": {
            "features_seconds": round(extracted - started, 2),
            "metrics_seconds": round(time.perf_counter() - extracted, 2),
            **machine(),
        },
    }
    write_json(out / RESULT, result)
    return Evaluation(result=result, left_out=sum(map(len, skipped.values())))


class _Figures:
    """Computes one metric at a time from feature files."""

    def __init__(
        self,
        settings: GenerationSettings,
        reference: Reference,
        networks: Mapping[str, LoadedNetwork],
        ours: Mapping[str, FeatureFiles],
        theirs: Mapping[str, FeatureFiles],
    ) -> None:
        self.settings, self.reference, self.networks = settings, reference, networks
        self.ours, self.theirs = ours, theirs
        self.references: int | None = None
        """Number of references that precision and recall compared with."""

    def compute(self, metric: str) -> dict[str, Any]:
        """Return the figures of a metric of `METRICS`, by name."""
        network = self.networks[self.settings.network_of(metric)]
        compute = getattr(self, f"_{metric.replace('-', '_')}")
        return {f"{network.prefix}{key}{network.suffix}": value for key, value in compute(network).items()}

    def _fid(self, network: LoadedNetwork) -> dict[str, Any]:
        return {"FID": self._frechet(network, FRECHET_OUTPUTS["fid"])}

    def _sfid(self, network: LoadedNetwork) -> dict[str, Any]:
        return {"sFID": self._frechet(network, FRECHET_OUTPUTS["sfid"])}

    def _fd_dinov2(self, network: LoadedNetwork) -> dict[str, Any]:
        return {"FD-DINOv2": self._frechet(network, FRECHET_OUTPUTS["fd-dinov2"])}

    def _is(self, network: LoadedNetwork) -> dict[str, Any]:
        score = inception_score(self.ours[network.name].load("logits"))
        return {"IS": score.mean, "IS-std": score.std}

    def _pr(self, network: LoadedNetwork) -> dict[str, Any]:
        features = self._reference_subset(network)
        self.references = len(features)
        found = precision_recall(self.ours[network.name].load("pool"), features, self.settings.k)
        return {"precision": found.precision, "recall": found.recall}

    def _kid(self, network: LoadedNetwork) -> dict[str, Any]:
        samples = _subset(self.ours[network.name].load("pool"), self.settings.kid_samples, self.settings.seed)
        found = kernel_distance(samples, self._reference_subset(network))
        return {"KID": found.value, "KID-interval": [found.low, found.high]}

    def _frechet(self, network: LoadedNetwork, output: str) -> float:
        ours = gaussian_of(self.ours[network.name], output)
        self._check_count("samples", ours)
        stored = stored_gaussian(self.reference, network, output)
        if stored is None:
            stored = gaussian_of(self.theirs[network.name], output)
            self._check_count("reference", stored)
        return frechet_distance(ours, stored)

    def _check_count(self, name: str, gaussian: Gaussian) -> None:
        checks.check_count(name, gaussian.num_images or 0, len(gaussian.mean), self.settings)

    def _reference_subset(self, network: LoadedNetwork) -> Tensor:
        return _subset(self.theirs[network.name].load("pool"), self.settings.references, self.settings.seed)


def _subset(features: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` rows drawn without replacement, in their order, or all if there are no more."""
    return features if len(features) <= count else features[draw_numbers(len(features), count, seed)]


def _needs_images(name: str, reference: Reference, settings: GenerationSettings) -> bool:
    """Return True if a metric of network `name` needs features of the reference's images."""
    return any(
        FRECHET_OUTPUTS.get(metric) not in reference.statistics or settings.proxy
        for metric in settings.chosen
        if metric != "is" and settings.network_of(metric) == name
    )


def _check_outputs(
    reference: Reference, networks: Mapping[str, LoadedNetwork], settings: GenerationSettings
) -> None:
    """Check, before the features are computed, that the reference has what every metric needs."""
    for metric in settings.chosen:
        name = settings.network_of(metric)
        if reference.images is None and (metric in ("pr", "kid", "fd-dinov2") or settings.proxy):
            raise UserError(
                f"{reference.path}: has no images (arr_0), which {metric} needs; use a file with images, a"
                " folder, or other --metrics"
            )
        if metric in FRECHET_OUTPUTS:
            stored_gaussian(reference, networks[name], FRECHET_OUTPUTS[metric])


def _protocol(settings: GenerationSettings, figures: _Figures) -> dict[str, Any]:
    return {
        **asdict(settings) | {"weights": None, "metrics": list(settings.chosen)},
        "references": figures.references,
        "inception_score_splits": SPLITS,
        "covariance_divisor": "N - 1",
        "accumulation": "float64",
        "mind": "not implemented (arXiv 2605.06797)",
    }
