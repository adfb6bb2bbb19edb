"""The regression gate: figures are those of expected.json, and a planted regression is caught."""

import json
import warnings

import pytest
import torch

from benchmarks import quick
from benchmarks.gate import expected, figures
from benchmarks.gate.allocations import peak_bytes
from benchmarks.gate.expected import IMPROVEMENT, LOSS, NEW, SAME, Finding
from cat_fast.errors import UserError
from cat_fast.generator import blocks

KINDS = {
    "flops": {"tolerance": 0},
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
    """An MLP that copies its input, which no test of values would notice."""
    forward = blocks.Mlp.forward
    monkeypatch.setattr(blocks.Mlp, "forward", lambda self, x: forward(self, x.clone()))
    findings = expected.compare(figures.transformer_step(), expected.read())
    verdicts = {finding.name: finding.verdict for finding in findings}
    assert verdicts["functions.transformer"] == verdicts["bytes.transformer"] == LOSS
    assert quick.report(findings) == 1
    assert "loss         functions.transformer" in capsys.readouterr().out


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


def test_registers_are_compared_for_listed_compilers_only():
    row = {"case": "c", "name": "k", "architecture": 80, "registers": 40, "spill_bytes": 0}
    verdicts = [f.verdict for f in expected.compare_kernels([row], "triton 1", CONTENT)]
    assert verdicts == [LOSS, SAME]
    assert expected.compare_kernels([row], "triton 2", CONTENT) == []
    assert expected.compare_kernels([row | {"name": "new"}], "triton 1", CONTENT)[0].verdict == NEW
    smaller = {**row, "registers": 24}
    assert expected.kernel_figures([row, smaller]) == {"c:k:sm_80": [40, 0]}


def test_an_improvement_asks_to_update_the_file(capsys):
    better = Finding("flops.a", 90, 100, 0.0, False)
    assert quick.report([better]) == 0
    assert "record them with python -m benchmarks.quick --update" in capsys.readouterr().out


def test_the_command_updates_the_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "expected.json"
    path.write_text(json.dumps(CONTENT))
    monkeypatch.setattr(quick, "FAST", {"one": lambda: {"flops.a": 110.0}})
    monkeypatch.setattr(quick.expected, "read", lambda: json.loads(path.read_text()))
    monkeypatch.setattr(
        quick.expected,
        "update",
        lambda content, found, update=expected.update: update(content, found, path),
    )
    assert quick.main(["--fast"]) == 1
    assert quick.main(["--fast", "--update"]) == 0
    assert quick.main(["--fast"]) == 0
    written = json.loads(path.read_text())
    assert written["figures"] == {"flops.a": 110.0, "peak_bytes.a": 1000, "fill.a": 0.99}
    assert "one: 0.0 s" in capsys.readouterr().out


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
