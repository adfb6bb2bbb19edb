"""Loading the compiled operators: a library that does not fit is rejected with one warning."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RUN_WITH = """
import json, sys, warnings
import torch
from cat_fast.kernels import library
{setup}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from cat_fast.kernels import backends
    from cat_fast.kernels.group_norm_silu.op import group_norm_silu
    from cat_fast.kernels.group_norm_silu.reference import group_norm_silu_reference
    x, weight, bias = torch.randn(2, 8, 5, 3), torch.randn(8), torch.randn(8)
    results = [group_norm_silu(x, weight, bias, 4, 1e-5) for _ in range(3)]
    want = group_norm_silu_reference(x, weight, bias, 4, 1e-5)
print(json.dumps({{
    "warnings": [str(w.message) for w in caught if "rejected" in str(w.message)],
    "backend": backends.choose("group_norm_silu", x),
    "report": [(row.op, row.backend, row.status) for row in backends.report()],
    "right": all(torch.equal(y, want) for y in results),
}}))
"""


def run(setup):
    environment = {name: value for name, value in os.environ.items() if name != "CAT_FAST_BACKEND"}
    script = [sys.executable, "-c", RUN_WITH.format(setup=setup)]
    done = subprocess.run(script, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_broken_library_is_rejected_with_one_warning(tmp_path):
    broken = tmp_path / "_ops.abi3.so"
    broken.write_bytes(b"\\x7fELF, but nothing more")
    result = run(f"library.find = lambda name: {str(broken)!r}")
    assert len(result["warnings"]) == 1
    assert str(broken) in result["warnings"][0]
    assert result["backend"] == "reference"
    assert result["right"]


@pytest.mark.skipif(
    importlib.util.find_spec("cat_fast._ops") is None, reason="the C++ operators are not built"
)
def test_a_torch_older_than_the_stable_abi_is_rejected_with_one_warning():
    result = run("library.MIN_TORCH = library.Version('99.1')")
    assert len(result["warnings"]) == 1
    assert "needs torch >= 99.1" in result["warnings"][0]
    assert result["backend"] == "reference"
    assert result["right"]


@pytest.mark.skipif(
    importlib.util.find_spec("cat_fast._ops") is None, reason="the C++ operators are not built"
)
@pytest.mark.parametrize(
    ("setup", "missing"),
    [
        ("library.OPERATORS['_ops'] += ('new_operator',)", "new_operator"),
        ("library.ADDED_ARGUMENTS = {'pack': 'new_argument'}", "pack"),
    ],
)
def test_a_library_built_from_older_sources_is_rejected_with_one_warning(setup, missing):
    result = run(setup)
    assert len(result["warnings"]) == 1
    assert f"without the current {missing} on CPU" in result["warnings"][0]
    assert result["backend"] == "reference"
    assert result["right"]


def test_a_library_that_is_not_built_causes_no_warning():
    result = run("library.find = lambda name: None")
    assert result["warnings"] == []
    assert result["backend"] == "reference"
    assert result["right"]
    assert any(backend == "cpp" and "not built" in status for _, backend, status in result["report"])


@pytest.mark.parametrize("package", ["transformers", "diffusers"])
def test_hugging_face_libraries_import_from_the_repository_root(package):
    """They probe for a package named `kernels` and so import ours, which must be only a docstring."""
    script = f"""
import {package}
from {package}.utils import import_utils
import kernels, sys
assert kernels.__doc__ and not [name for name in vars(kernels) if not name.startswith("__")], vars(kernels)
assert not any(name.startswith("kernels.") for name in sys.modules)
import cat_fast.kernels.group_norm_silu.op
import {package}.models
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
