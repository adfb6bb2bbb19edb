"""The regression gate: figures are those of expected.json, and a planted regression is caught."""

import json
import re
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import quick
from benchmarks.gate import expected, figures
from benchmarks.gate.allocations import peak_bytes
from benchmarks.gate.expected import GONE, IMPROVEMENT, LOSS, NEW, SAME
from cat_fast.errors import UserError
from cat_fast.generator import blocks

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
KINDS = {
    "flops": {"tolerance": 0},
    "collectives": {"tolerance": 0},
    "peak_bytes": {"tolerance": 0.02},
    "fill": {"tolerance": 0.001, "higher_is_better": True},
    "registers": {"tolerance": 0},
    "spill_bytes": {"tolerance": 0},
}
CONTENT = {
    "kinds": KINDS,
    "figures": {"flops.a": 100, "peak_bytes.a": 1000, "fill.a": 0.99},
    "compilers": {"triton 1": {"c:k:sm_80": [32, 0]}},
}


@pytest.mark.parametrize("group", figures.FAST)
def test_figures_are_not_worse_than_expected(group):
    findings = expected.compare(figures.FAST[group](), expected.read())
    worse = [finding.line() for finding in findings if finding.verdict in (LOSS, NEW)]
    assert not worse
    for finding in findings:
        if finding.verdict == IMPROVEMENT:
            warnings.warn(f"{finding.line()}; record it with {expected.UPDATE}", stacklevel=1)


def test_a_planted_regression_is_caught(monkeypatch, capsys):
    """An MLP that keeps a copy of its input and adds a product, which no test of values would notice."""
    forward = blocks.Mlp.forward
    kept = []

    def wasteful(self, x):
        kept.append(x.clone().repeat(1, 64))
        return forward(self, x) + 0 * x @ torch.ones(x.shape[-1], x.shape[-1], device=x.device)

    monkeypatch.setattr(blocks.Mlp, "forward", wasteful)
    counted = figures.transformer_step() | figures.transformer_flops()
    findings = expected.compare(counted, expected.read())
    verdicts = {finding.name: finding.verdict for finding in findings}
    for name in ("functions", "bytes", "peak_bytes"):
        assert verdicts[f"{name}.transformer"] == LOSS
    assert verdicts["flops.cat_xl_2_blocks.linear.16x"] == LOSS
    assert quick.report(findings) == 1
    assert "loss         functions.transformer" in capsys.readouterr().out


def test_registers_planted_in_a_compiled_kernel_are_caught(monkeypatch, capsys):
    content = expected.read()
    compiler, kernels = next(iter(content["compilers"].items()))
    rows = []
    for key, (registers, spills) in kernels.items():
        case, name, architecture = key.split(":")
        costs = {"registers": registers, "spill_bytes": spills}
        rows.append({"case": case, "name": name, "architecture": int(architecture[3:]), **costs})
    monkeypatch.setattr(quick, "compile_kernels", lambda *, alternate: (rows, compiler))
    assert quick.main(["--kernels"]) == 0
    rows[0]["registers"] += 8
    assert quick.main(["--kernels"]) == 1
    assert "1 loss, 0 gone, 0 new" in capsys.readouterr().out
    monkeypatch.setattr(quick, "compile_kernels", lambda *, alternate: (rows, "triton 0"))
    assert quick.main(["--kernels"]) == 0
    assert "registers not compared: expected.json lists no triton 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "found", "verdict"),
    [
        ("flops.a", 101, LOSS),
        ("flops.a", 99, IMPROVEMENT),
        ("flops.a", 100, SAME),
        ("peak_bytes.a", 1019, SAME),
        ("peak_bytes.a", 1021, LOSS),
        ("fill.a", 0.98, LOSS),
        ("fill.a", 0.9895, SAME),
        ("fill.a", 1.0, IMPROVEMENT),
        ("flops.b", 1, NEW),
    ],
)
def test_tolerances_are_those_of_the_kind(name, found, verdict):
    (finding,) = expected.compare({name: found}, CONTENT)
    assert finding.verdict == verdict
    assert finding.line().startswith(verdict)


def test_what_is_no_longer_counted_is_gone():
    """Collectives are counted by a test, and a part of the figures only where all are counted."""
    content = {**CONTENT, "figures": {**CONTENT["figures"], "collectives.a": 2}}
    found = {"flops.a": 100, "fill.a": 0.99}
    assert {finding.verdict for finding in expected.compare(found, content)} == {SAME}
    gone = expected.compare(found, content, complete=True)[-1]
    assert (gone.name, gone.verdict) == ("peak_bytes.a", GONE)
    assert gone.line().startswith("gone         peak_bytes.a: no longer counted, expected 1,000")
    assert quick.report([gone]) == 1


def test_registers_are_compared_for_listed_compilers_only():
    row = {"case": "c", "name": "k", "architecture": 80, "registers": 40, "spill_bytes": 0}
    verdicts = [f.verdict for f in expected.compare_kernels([row], "triton 1", CONTENT)]
    assert verdicts == [LOSS, SAME]
    assert expected.compare_kernels([row], "triton 2", CONTENT) == []
    for other, verdicts in (
        ({"name": "new"}, [GONE, NEW, NEW]),
        ({"case": "new"}, [GONE, NEW, NEW]),
        ({"architecture": 90}, [NEW, NEW]),  # the other one was not compiled
    ):
        found = expected.compare_kernels([row | other], "triton 1", CONTENT)
        assert [finding.verdict for finding in found] == verdicts
    smaller = {**row, "registers": 24}
    assert expected.kernel_figures([row, smaller]) == {"c:k:sm_80": [40, 0]}


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Replaces what is counted and compiled; returns the file of expectations and the figures."""
    path, figures_of, compiled = tmp_path / "expected.json", {"flops.a": 110.0}, []
    path.write_text(json.dumps({**CONTENT, "figures": {**CONTENT["figures"], "collectives.a": 2}}))
    row = {"case": "c", "name": "k", "architecture": 80, "registers": 40, "spill_bytes": 0}
    monkeypatch.setattr(quick, "FAST", {"one": lambda: dict(figures_of)})
    monkeypatch.setattr(quick, "SLOW", {})
    monkeypatch.setattr(quick.expected, "read", lambda: json.loads(path.read_text()))
    monkeypatch.setattr(quick.expected, "update", partial(expected.update, path=path))
    monkeypatch.setattr(
        quick, "compile_kernels", lambda *, alternate: compiled.append(alternate) or ([row], "triton 1")
    )
    return SimpleNamespace(path=path, figures=figures_of, compiled=compiled)


def test_the_command_updates_the_file_and_lists_what_it_accepts(counted, capsys):
    assert quick.main(["--fast"]) == 1
    assert quick.main(["--fast", "--update"]) == 0
    printed = capsys.readouterr().out
    assert "wrote expected.json; accepted: 1 loss, 0 gone, 0 new, 0 improvement" in printed
    assert "one: 0.0 s" in printed
    assert quick.main(["--fast"]) == 0
    written = json.loads(counted.path.read_text())
    assert written["figures"] == {"flops.a": 110, "peak_bytes.a": 1000, "fill.a": 0.99, "collectives.a": 2}
    counted.figures["flops.a"] = 90.0
    assert quick.main(["--fast"]) == 0
    assert "record them with python -m benchmarks.quick --update" in capsys.readouterr().out


def test_an_update_of_all_figures_compiles_for_both_architectures_and_drops_what_is_gone(counted, capsys):
    assert quick.main([]) == 1
    assert "2 loss, 2 gone" in capsys.readouterr().out
    assert quick.main(["--update"]) == 0
    assert counted.compiled == [True, False]
    written = json.loads(counted.path.read_text())
    assert written["figures"] == {"flops.a": 110.0, "collectives.a": 2}
    assert written["compilers"] == {"triton 1": {"c:k:sm_80": [40, 0]}}
    assert quick.main([]) == 0


@pytest.mark.parametrize("text", [None, "{", "{}", '{"kinds": 1, "figures": {}, "compilers": {}}'])
def test_a_missing_or_invalid_file_is_an_error(tmp_path, text):
    path = tmp_path / "expected.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"benchmarks\.quick --update"):
        expected.read(path)


def test_peak_memory_is_that_of_the_allocator():
    def run():
        a = torch.empty(1 << 20)
        b = torch.empty(1 << 20)
        del a
        return b, torch.empty(1 << 19)

    assert peak_bytes(run) == pytest.approx(8 << 20, rel=0.01)


def test_every_compiler_lists_the_same_kernels():
    """Triton 3.6 is the version of the GPU check's machine."""
    compilers = expected.read()["compilers"]
    assert any(name.startswith("triton 3.6") for name in compilers)
    assert len({frozenset(kernels) for kernels in compilers.values()}) == 1


def test_the_pinned_compiler_has_expected_registers():
    pinned = re.search(r"^triton==(\S+)$", CONSTRAINTS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert expected.read()["compilers"][f"triton {pinned[1]}"]
