"""Figures in the prose of the documents are those of the committed result that the document names."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

from benchmarks.shared.committed import committed

ROOT = Path(__file__).parents[2]
VARLEN = "varlen_attention.16x72_64x7+256x8+1024.forward"
NORM = "group_norm_silu.1x64x512x512_channels_last.forward"
SMALL_NORM = "group_norm_silu.1x256x128x128_channels_last"
FIGURES = [
    # document, text with {}, format, benchmark, key, factor
    ("kernels/varlen_attention/README.md", "reach {} GFLOP/s forward", ".0f", "kernels",
     f"cases/{VARLEN}/work/gflops_per_second", 1),
    ("kernels/varlen_attention/README.md", "forward, {} times as fast as padding", ".0f", "kernels",
     f"{VARLEN}.ratio_vs_padded", 1),
    ("kernels/varlen_attention/README.md", "padding and {} times as fast as a loop", ".1f", "kernels",
     f"{VARLEN}.ratio_vs_loop", 1),
    ("kernels/group_norm_silu/README.md", "201 MB at {} GB/s", ".0f", "kernels",
     f"cases/{NORM}/work/gb_per_second", 1),
    ("kernels/group_norm_silu/README.md", "{} times the rate of a plain copy", ".1f", "kernels",
     f"cases/{NORM}/work/of_copy_bandwidth", 1),
    ("kernels/group_norm_silu/README.md", "GB/s, {} times as fast as eager mode", ".2f", "kernels",
     f"{SMALL_NORM}.forward.ratio_vs_eager", 1),
    ("kernels/group_norm_silu/README.md", "134 MB, {} times as fast as eager mode", ".2f", "kernels",
     f"{SMALL_NORM}.forward_backward.ratio_vs_eager", 1),
    ("kernels/pack/README.md", "3 latents reach {} GB/s", ".0f", "kernels",
     "cases/pack.16_64x1+32x1+16x1.forward/work/gb_per_second", 1),
    ("kernels/pack/README.md", "24 latents {} GB/s", ".0f", "kernels",
     "cases/pack.16_64x8+32x8+16x8.forward/work/gb_per_second", 1),
    ("kernels/scalar_attention/README.md", "forward takes {} ms on two cores", ".1f", "kernels",
     "cases/scalar_attention.512x4096.forward/seconds/ours/median", 1000),
    ("kernels/scalar_attention/README.md", "two cores, {} times as fast as SDPA", ".0f", "kernels",
     "scalar_attention.512x4096.forward.ratio_vs_sdpa", 1),
    ("kernels/wide_attention/README.md", "reference reaches {} GFLOP/s forward at N = 1024", ".0f", "kernels",
     "cases/wide_attention.1x512x1024.forward/work/gflops_per_second", 1),
    ("docs/data.md", "it read {} times as many images per second as webdataset's", ".2f", "loader",
     "workers_2.ratio_vs_webdataset", 1),
    ("docs/data.md", "That is {} times as many as a single process", ".2f", "loader",
     "workers_2.ratio_vs_one_process", 1),
    ("docs/data.md", "With one worker, it read {} times as many as webdataset's", ".2f", "loader",
     "workers_1.ratio_vs_webdataset", 1),
    ("docs/efficiency.md", "the loader, {} images per second and core", ".1f", "scaling",
     "about/assumptions/loader_images_per_second_per_core/value", 1),
    ("docs/distilled_scorers.md", "in one call, {} times as many as the scorer", ".1f", "scorers",
     "fast.over_former/in_one_call", 1),
    ("docs/distilled_scorers.md", "replaced, {} times one by one", ".1f", "scorers",
     "fast.over_former/one_by_one", 1),
    ("docs/distilled_scorers.md", "and {} times for 10,000 captions including the start", ".1f", "scorers",
     "fast.over_former/with_startup", 1),
    ("docs/distilled_scorers.md", "which takes {} s instead of 5.7 s", ".1f", "scorers",
     "startup_seconds/fast", 1),
    ("docs/distilled_scorers.md", "of an AMD EPYC, it scores {} captions per second", ".0f", "scoring",
     "scorers/accurate/footprint/captions_per_processor_second", 1),
    ("docs/distilled_scorers.md", "4,000 captions, and {} in calls of", ".0f", "scoring",
     "scorers/accurate/rates/captions", 1),
    ("docs/distilled_scorers.md", "with oneDNN it is {} times as fast as with MKL", ".2f", "scoring",
     "scorers/accurate/libraries/mkl_over_onednn/median", 1),
    ("docs/generator.md", "and to {} % on uniform lengths", ".2f", "packing",
     "packer/mixes/uniform/fill", 100),
    ("docs/generator.md", "Packed training reaches {} to 101 %", ".0f", "packing",
     "cases/216/work/of_matmul_rate", 100),
    ("docs/generator.md", "reaches 96 to {} % of the rate", ".0f", "packing",
     "cases/197/work/of_matmul_rate", 100),
    ("docs/gpu.md", "16,384 tokens, H100 | {} ms", ".0f", "roofline",
     "steps/cat_xl.mixed/predicted_ms/H100", 1),
    ("docs/inference.md", "the server was ready in {} s", ".1f", "serving_load", "ready_seconds", 1),
    ("docs/inference.md", "with {} GB resident", ".2f", "serving_load", "resident_bytes", 1e-9),
    ("docs/inference.md", "in {} ms at p99", ".0f", "serving_load", "health_p99_seconds", 1000),
    ("docs/inference.md", "it drained in {} s", ".1f", "serving_load", "drain_seconds", 1),
    ("docs/training.md", "dominate | {} % | 2.1 % |", ".1f", "straggler", "per_rank.64.wait", 100),
    ("docs/training.md", "6.8 % | {} % |", ".1f", "straggler", "balanced.64.wait", 100),
    ("docs/training.md", "ranks wait {} % of the time", ".1f", "straggler", "per_rank.64.jitter.wait", 100),
    ("docs/training.md", "and {} % with `balanced`", ".1f", "straggler", "balanced.64.jitter.wait", 100),
    ("docs/training.md", "all train at 16x wait {} %", ".1f", "straggler", "equal.64.jitter.wait", 100),
]  # fmt: skip


@cache
def words(document: str) -> str:
    return " ".join((ROOT / document).read_text(encoding="utf-8").split())


@cache
def results(benchmark: str) -> dict:
    return json.loads(committed(benchmark).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("document", "text", "form", "benchmark", "key", "factor"), FIGURES)
def test_a_figure_is_that_of_the_named_result(document, text, form, benchmark, key, factor):
    value = results(benchmark)
    for part in key.split("/"):
        value = value[part]
    assert text.format(format(value * factor, form)) in words(document)
    assert f"benchmarks/results/{committed(benchmark).name}" in words(document)


MEASURED = re.compile(
    r"\d[\d.,]*\s*(?:×|times)\s+as\s+(?:fast|many|much)|"
    r"\d[\d.,]*\s*(?:GB/s|GFLOP/s|TFLOP/s|images/s|images per second|captions per second|tokens/s)\b|"
    r"\d[\d.,]*\s*(?:ms|s)\s+(?:per|on two|instead)"
)
"""Figures of speed."""
SOURCE = re.compile(r"\.json|\.py`|data sheets|One table gives")
"""A result, the script that wrote it, or another origin."""
RECORDED_ELSEWHERE = {"docs/nano.md": "model cards", "docs/language_models.md": "scores.parquet of the run"}
DOCUMENTS = [
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "kernels/*/README.md", "csrc/*/README.md")
    for path in sorted(ROOT.glob(pattern))
]


@pytest.mark.parametrize("document", sorted(set(DOCUMENTS) - set(RECORDED_ELSEWHERE)))
def test_a_section_with_figures_of_speed_names_their_source(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    text = re.sub(r"<!-- \w+ -->.*?<!-- end -->|```.*?```", "", text, flags=re.DOTALL)
    for section in re.split(r"^#+ .*$", text, flags=re.MULTILINE):
        found = MEASURED.search(" ".join(section.split()))
        assert not found or SOURCE.search(section), found[0]


TABLES = {
    "docs/efficiency.md": {
        **dict.fromkeys(("tokens", "transformer", "tokenizer", "scoring", "fixed"), "claims"),
        **dict.fromkeys(("kernels", "steps"), "roofline"),
        "compiled": "gpu_static",
        "scaling": "scaling",
        "validation": "scaling_validation",
    },
    "docs/gpu.md": {"launches": "launches", "dispatch": "dispatch"},
    "docs/kernels.md": {"speed": "kernels", "static": "gpu_static"},
}
"""Benchmarks of generated tables, by document."""


@pytest.mark.parametrize("document", TABLES)
def test_a_section_with_a_generated_table_names_its_file(document):
    sections = re.split(r"^#+ .*$", (ROOT / document).read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {name: section for section in sections for name in re.findall(r"<!-- (?!end)(\w+) -->", section)}
    for name, benchmark in TABLES[document].items():
        assert f"benchmarks/results/{committed(benchmark).name}" in found[name], name


def test_files_of_measured_claims_are_named_in_their_document():
    rows = [row for group in results("claims")["claims"].values() for row in group if row["measured"]]
    for row in rows:
        assert f"benchmarks/results/{row['measured']['file']}" in words("docs/efficiency.md"), row["claim"]
    assert len(rows) >= 10
