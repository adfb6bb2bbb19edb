"""The GPU check runs with the packages of its machine and those that are brought along, and no others."""

import json
import os

import pytest

from benchmarks.gpu.blocks import EXPECTED
from benchmarks.gpu.requirements import PRESENT, Environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # minutes on idle cores
BROUGHT = {
    "annotated-types", "braceexpand", "deepspeed", "diffusers", "hjson", "lpips", "omegaconf", "pydantic",
    "pydantic-core", "typing-inspection", "webdataset",
}  # fmt: skip
"""What the machine lacks; a new name here makes the folder of wheels larger."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment of the machine's packages, completed by those that the imports of the check need."""
    environment = Environment(tmp_path_factory.mktemp("environment"))
    environment.add_present()
    environment.brought = environment.complete()
    return environment


def test_only_missing_packages_are_brought(environment):
    assert set(environment.brought) == BROUGHT
    assert not set(environment.brought) & PRESENT


def test_a_dry_run_has_every_key_and_survives_planted_failures(environment, tmp_path, monkeypatch):
    monkeypatch.setenv("GPU_CHECK_PLANT", "error=sanitizer,hang=ceilings")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    ran = environment.run("-m", "benchmarks.gpu_check", "--dry", "--out", str(tmp_path), "--seconds", "1800")
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert ran.returncode == 1
    assert content["dry"]
    assert content["blocks"].keys() == EXPECTED.keys()
    for name, block in content["blocks"].items():
        assert block["figures"].keys() >= set(EXPECTED[name])
    states = {name: block["state"] for name, block in content["blocks"].items()}
    assert (states.pop("sanitizer"), states.pop("ceilings")) == ("failed", "timeout")
    assert set(states.values()) <= {"passed", "skipped"}, ran.stdout[-3000:]
