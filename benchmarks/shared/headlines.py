"""The comparisons that a report begins with: how many times as fast, and the result with the figure."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Headline(NamedTuple):
    """A comparison that one result answers."""

    text: str
    benchmark: str
    value: Callable[[Mapping[str, Any]], float]
    """Reads it from the content of the result; KeyError if it has none."""


def _ratio(key: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda content: content[key]


def _images(case: str, baseline: str) -> Callable[[Mapping[str, Any]], float]:
    def value(content: Mapping[str, Any]) -> float:
        ours, theirs = (content["cases"][name]["rates"]["images"] for name in (case, baseline))
        return ours / theirs

    return value


def _goal(load: str, name: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda content: content["mixes"]["cat"][load]["goals"][name]["value"]


HEADLINES = (
    Headline(
        "training on packed images, 197 tokens on average, against a fixed 16x",
        "packing",
        _ratio("197.ratio_vs_fixed16"),
    ),
    Headline(
        "training on packed images, 216 tokens on average, against a fixed 16x",
        "packing",
        _ratio("216.ratio_vs_fixed16"),
    ),
    Headline("the same images packed against padded", "packing", _ratio("216.ratio_vs_padded")),
    Headline(
        "the same images packed against buckets of equal ratio", "packing", _ratio("216.ratio_vs_bucketed")
    ),
    Headline(
        "training a DiT-S on 6/49/45 against a fixed 16x, images/s",
        "training_steps",
        _images("train.transformer.mix", "train.transformer.fixed_16x"),
    ),
    Headline(
        "generating with a DiT-S on 6/49/45 against a fixed 16x, images/s",
        "training_steps",
        _images("generate.mix", "generate.fixed_16x"),
    ),
    Headline(
        "attention over packed sequences against padding",
        "kernels",
        _ratio("varlen_attention.16x72_64x7+256x8+1024.forward.ratio_vs_padded"),
    ),
    Headline(
        "attention with 512 heads of one dimension, 1,024 positions, against torch's",
        "kernels",
        _ratio("scalar_attention.512x1024.forward.ratio_vs_sdpa"),
    ),
    Headline(
        "encoding at 8x with the paper's 512 heads against diffusers' blocks",
        "autoencoder",
        _ratio("heads512.8x.encode.fp32.ratio_vs_nchw_eager"),
    ),
    Headline(
        "training a DiT-S in fp32 with oneDNN's products against MKL's",
        "linear",
        lambda content: content["cases"]["transformer.dit_s"]["mkl_over_onednn"]["median"],
    ),
    Headline(
        "serving at 0.8 x capacity: requests done within three times their time alone, against dynamic"
        " batching",
        "serving",
        _goal("0.8", "share within three times alone over dynamic_batching"),
    ),
    Headline(
        "serving at 2 x capacity: images/s against FIFO step batching",
        "serving",
        _goal("2", "throughput over fifo_step_batching"),
    ),
    Headline(
        "loading images with two workers against webdataset",
        "loader",
        _ratio("workers_2.ratio_vs_webdataset"),
    ),
)


def found_in(contents: Mapping[str, Mapping[str, Any]]) -> list[tuple[Headline, float]]:
    """Return the headlines that the results have, with their values.

    Args:
        contents: results by benchmark.
    """
    found = []
    for headline in HEADLINES:
        try:
            found.append((headline, float(headline.value(contents[headline.benchmark]))))
        except (KeyError, TypeError):
            continue
    return found
