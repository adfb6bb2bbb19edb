"""Prometheus metrics of a server."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cat_fast.inference.engine.handle import RequestRecord
from cat_fast.inference.server.service import Service

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class ServerMetrics:
    """Histograms of requests, and the engine's totals at the time of a scrape."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(service))
        self._http = Histogram(
            "cat_fast_http_seconds",
            "Time to the end of a reply",
            ["route", "status"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._stages = Histogram(
            "cat_fast_image_seconds",
            "Time per image and stage",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def observe_http(self, route: str, status: int, seconds: float) -> None:
        """Count a reply."""
        self._http.labels(route, str(status)).observe(seconds)

    def observe_image(self, record: RequestRecord) -> None:
        """Count a finished image."""
        for stage in ("queued", "denoising", "decoding"):
            self._stages.labels(stage).observe(getattr(record, f"seconds_{stage}"))
        self._stages.labels("total").observe(record.seconds)

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        engine, service = self._service.engine, self._service
        totals = engine.statistics
        images = CounterMetricFamily("cat_fast_images", "Images by outcome", labels=["outcome"])
        for outcome in ("submitted", "finished", "cancelled", "failed"):
            images.add_metric([outcome], getattr(totals, outcome))
        yield images
        refused = CounterMetricFamily(
            "cat_fast_refused", "Requests for images that were not accepted, by error code", labels=["code"]
        )
        for code, count in sorted(dict(service.refusals).items()):
            refused.add_metric([code], count)
        yield refused
        errors = GaugeMetricFamily(
            "cat_fast_prediction_error", "Median relative error of predicted seconds", labels=["load"]
        )
        for name, alone in (("alone", True), ("shared", False)):
            error = totals.median_error(alone=alone)
            if error is not None:
                errors.add_metric([name], error)
        yield errors
        report = engine.last_step
        invariance = service.invariance
        for name, text, value in (
            ("unfinished", "Images queued, between steps or in the decoder", engine.unfinished),
            ("queued", "Images that have not had a step", engine.waiting),
            ("fill", "Rows / row budget over all steps", totals.fill),
            (
                "last_step_fill",
                "Rows / row budget of the last step",
                report.rows / report.max_rows if report else 0,
            ),
            ("padding", "Share of padding in the tokens of all steps", totals.padding),
            ("overhead", "Share of step time outside the transformer", totals.overhead),
            ("tokens_per_second", "Rows per second of step time", _rate(totals.rows, totals.seconds_steps)),
            ("flops_per_second", "Calibrated rate of large steps", engine.cost.flops_per_second),
            ("ready", "1 if images are drawn", service.ready),
            (
                "bits_independent",
                "1 if bits do not depend on neighbours",
                bool(invariance and invariance.independent),
            ),
        ):
            yield GaugeMetricFamily(f"cat_fast_{name}", text, value=float(value))
        for name, text, value in (
            ("steps", "Steps of the engine", totals.steps),
            ("rows", "Tokens of all steps, twins counted", totals.rows),
            (
                "deadline_missed",
                "Finished images that took longer than their deadline",
                totals.deadlines_missed,
            ),
            ("tokens", "Tokens of finished images", totals.tokens_finished),
            ("denoising_seconds", "Time in the transformer", totals.seconds_denoising),
            ("decoding_seconds", "Time in the decoder", totals.seconds_decoding),
            ("out_of_memory", "Steps halved by an out-of-memory error", totals.out_of_memory),
        ):
            yield CounterMetricFamily(f"cat_fast_{name}", text, value=float(value))


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0
