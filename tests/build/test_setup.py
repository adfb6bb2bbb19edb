"""Building: requested extensions are built or refused with one line, and only changed sources recompile."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_setup(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def tree(tmp_path):
    """Copy the files that setup.py reads, so that builds do not touch the working tree."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path)
    for name in ("csrc", "kernels", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "README.md").write_text("# cat-fast\n")
    package = tmp_path / "cat_fast"
    package.mkdir()
    (package / "__init__.py").write_text("")
    return tmp_path


def test_an_unknown_cuda_choice_is_refused_in_one_line(tree):
    done = run_setup("--name", cwd=tree, CAT_FAST_CUDA="yes")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == "cat-fast: CAT_FAST_CUDA=yes is unknown: use auto, 0 or 1"


def test_impossible_cuda_is_refused_in_one_line_if_requested(tree):
    done = run_setup("--name", cwd=tree, CAT_FAST_CUDA="1", CUDA_HOME=str(tree))
    assert done.returncode != 0
    assert re.fullmatch(
        r"cat-fast: CAT_FAST_CUDA=1, but .*(nvcc|without CUDA).*", done.stderr.strip().splitlines()[-1]
    )


def test_impossible_cuda_is_skipped_with_the_reason_by_default(tree):
    done = run_setup("--name", cwd=tree, CAT_FAST_CUDA="auto", CUDA_HOME=str(tree))
    assert done.returncode == 0
    assert "the CUDA kernels are not built: " in done.stderr


def test_without_torch_the_error_is_one_line_with_the_fix(tree):
    (tree / "torch.py").write_text("raise ImportError('no torch here', name='torch')\n")
    done = run_setup("--name", cwd=tree)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("cat-fast: building needs torch in this environment")
    assert "--no-build-isolation" in last
    assert run_setup("--name", cwd=tree, CAT_FAST_BUILD="0").returncode == 0


@pytest.mark.slow
def test_touching_one_source_recompiles_one_object_in_editable_installs(tree):
    def build():
        """Install editably elsewhere and return the objects that were compiled."""
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-build-isolation",
            "--no-deps",
            "--editable",
            str(tree),
        ]
        before = {path: path.stat().st_mtime_ns for path in (tree / "build").rglob("*.o")}
        target = ["--target", str(tree / "installed"), "--upgrade"]
        environment = {**os.environ, "CAT_FAST_CUDA": "0"}
        subprocess.run([*command, *target], env=environment, capture_output=True, check=True)
        objects = (tree / "build").rglob("*.o")
        return {path.relative_to(tree / "build/objects").as_posix() for path in objects
                if path.stat().st_mtime_ns != before.get(path)}  # fmt: skip

    operators = {f"cat_fast._ops/csrc/{path.parent.name}/cpu.o" for path in tree.glob("csrc/*/cpu.cpp")}
    assert build() == {"cat_fast._bindings/csrc/bindings.o", "cat_fast._ops/csrc/ops.o", *operators}
    assert build() == set()
    (tree / "csrc/ops.cpp").touch()
    assert build() == {"cat_fast._ops/csrc/ops.o"}
    (tree / "csrc/token_budget_packer/best_fit.h").touch()
    assert build() == {"cat_fast._bindings/csrc/bindings.o"}


def test_kernels_are_built_for_published_gpus_newer_ones_and_those_of_the_machine(monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="build")["architectures_for"]
    assert build([]) == "8.0;9.0+PTX"
    assert build([(8, 6), (9, 0), (8, 6)]) == "8.6;8.0;9.0+PTX"
