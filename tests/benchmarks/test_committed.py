"""Results are named MODEL_MACHINE_DATE.json, and every link to one is valid."""

import re
from pathlib import Path

import pytest

from benchmarks.shared import committed as names
from cat_fast.errors import UserError

ROOT = Path(__file__).parents[2]
EPYC = {"cpu": {"processor": "AMD EPYC 9B14 Processor", "threads": 2}, "gpus": []}


def test_every_committed_result_is_named_after_model_machine_and_date():
    wrong = [path.name for path in names.FOLDER.glob("*.json") if not names.NAME.fullmatch(path.name)]
    assert not wrong


def test_every_link_to_a_result_is_valid():
    documents = ("*.md", "docs/*.md", "kernels/*/*.md", "csrc/*/*.md")
    patterns = (*documents, "Makefile", "benchmarks/**/*.py", "scripts/*.py")
    linked = set()
    for path in (path for pattern in patterns for path in ROOT.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        linked |= {(path.name, link) for link in re.findall(r"benchmarks/results/[\w./-]+\.json", text)}
    assert len(linked) > 10
    assert not {(name, link) for name, link in linked if not (ROOT / link).exists()}


def test_the_newest_result_is_found_and_longer_names_are_not_mistaken(tmp_path):
    for name in (
        "gpu_static_sm80-sm90_2026-11-24.json",
        "kernels_amd-epyc-2t_2026-11-22.json",
        "kernels_intel-xeon-2t_2026-12-01.json",
    ):
        (tmp_path / name).touch()
    assert names.committed("kernels", tmp_path).name == "kernels_intel-xeon-2t_2026-12-01.json"
    assert names.committed("gpu_static", tmp_path).name == "gpu_static_sm80-sm90_2026-11-24.json"
    with pytest.raises(UserError, match=r"there are no results of gpu; run python -m benchmarks\.gpu"):
        names.committed("gpu", tmp_path)


def test_a_file_is_named_after_the_processor_or_the_gpus():
    assert names.machine_slug(EPYC) == "amd-epyc-9b14-2t"
    one = EPYC | {"gpus": [{"name": "NVIDIA H200"}]}
    assert names.machine_slug(one) == "nvidia-h200"
    assert names.machine_slug(EPYC | {"gpus": [*one["gpus"], *one["gpus"]]}) == "2xnvidia-h200"
    assert names.NAME.fullmatch("gpu_static_amd-epyc-9b14-2t_2026-11-24.json")["model"] == "gpu_static"
