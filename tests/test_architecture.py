"""Imports run downward and never in a cycle: a package of cat_fast imports only from packages below it."""

import ast
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PACKAGES = (
    "cli",
    "train",
    "demo",
    "training",
    "evaluation",
    "dual_token",  # draws with the pipelines of inference
    "inference",
    "models",
    "generator",
    "tokenizer",
    "weights",
    "packing",
    "complexity",
    "data",
    "kernels",
    "processes",
)
"""From top to bottom, as in CONTRIBUTING.md."""
FLOOR = ("errors", "config", "console", "integers", "processor", "hardware")
"""Modules that every package may import."""
GROUPED = ("training", "evaluation", "dual_token", "data", "inference", "complexity")
"""Packages with sub-packages, which import each other in one direction only."""
NATIVE = ("_bindings",)
"""Compiled from csrc/, which is below everything."""


def modules() -> dict[str, Path]:
    """Return every module by its dotted name, kernels/ under the name it is installed as."""
    found = {}
    for folder, package in ((ROOT / "cat_fast", "cat_fast"), (ROOT / "kernels", "cat_fast.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts])] = path
    return found


def imports(name: str, source: str) -> Iterator[str]:
    """Yield dotted names of all imports of a module, including those in functions and for type checking."""
    package = name.split(".")[:-1]  # also for an __init__, whose name ends in .__init__
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{home}.{alias.name}" for alias in node.names)


@cache
def graph() -> dict[str, set[str]]:
    """Return the modules that each module imports; the root, which re-exports names, is left out."""
    found = modules()
    del found["cat_fast.__init__"]
    return {
        name: {
            module
            for target in imports(name, path.read_text(encoding="utf-8"))
            if (module := _module_of(target, found)) not in (None, name)
        }
        for name, path in found.items()
    }


def _module_of(target: str, known: Collection[str]) -> str | None:
    """Return the module that an import reads: `target`, its package, or the one that defines the name."""
    while target:
        for name in (target, f"{target}.__init__"):
            if name in known:
                return name
        target = target.rpartition(".")[0]
    return None


def part_of(name: str) -> str:
    """Return the sub-package of a module; a module directly in a package is its own part."""
    package, _, module = name.rpartition(".")
    return package if package.count(".") > 1 else f"{package}.{module}"


def parts_of(package: str, edges: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return the parts of a package with the parts that each imports."""
    inside = {name for name in edges if name.split(".")[1] == package}
    found: dict[str, set[str]] = {part_of(name): set() for name in inside}
    for name in inside:
        found[part_of(name)] |= {part_of(other) for other in edges[name] & inside} - {part_of(name)}
    return found


def find_cycle(edges: Mapping[str, set[str]]) -> list[str]:
    """Return the nodes of a cycle, the first one again at the end; empty if there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def violations(name: str, source: str) -> list[str]:
    """Return the imports of one module that do not run downward."""
    package = name.split(".")[1]
    return [
        f"{name} imports {target}"
        for target in imports(name, source)
        if target.split(".")[0] in ("cat_fast", "kernels") and not _allowed(package, target)
    ]


def _allowed(package: str, target: str) -> bool:
    top, _, rest = target.partition(".")
    other = rest.split(".")[0]
    if top == "kernels":  # a second copy of cat_fast.kernels
        return False
    if other in FLOOR or other in NATIVE or other == "__version__":
        return True
    if package in FLOOR or other not in PACKAGES:  # names of the root are for users of the package
        return False
    return PACKAGES.index(other) >= PACKAGES.index(package)


# The root re-exports public names of all packages, so it is exempt.
@pytest.mark.parametrize("name", sorted(modules().keys() - {"cat_fast.__init__"}))
def test_imports_run_downward(name):
    assert name.split(".")[1] in PACKAGES + FLOOR, f"{name} is in no package of PACKAGES: add it"
    assert violations(name, modules()[name].read_text(encoding="utf-8")) == []


def test_imports_have_no_cycle():
    assert find_cycle(graph()) == []


@pytest.mark.parametrize("package", GROUPED)
def test_sub_packages_import_in_one_direction(package):
    parts = parts_of(package, graph())
    assert any(parts.values()), "expected several parts"
    assert find_cycle(parts) == []


def test_benchmarks_import_no_tests():
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    assert files
    found = {path: set(imports("benchmarks", path.read_text(encoding="utf-8"))) for path in files}
    assert [
        path.name for path, targets in found.items() if any(t.startswith("tests.") for t in targets)
    ] == []


def test_a_cycle_is_found():
    names = ("store.__init__", "health.guard", "health.watchdog", "metrics.log", "loop")
    store, guard, watchdog, log, loop = (f"cat_fast.training.{name}" for name in names)
    edges = {store: {guard}, guard: {log}, log: {watchdog}, watchdog: set(), loop: {store}}
    assert find_cycle(edges) == []
    found = find_cycle(parts_of("training", edges))
    assert set(found) == {"cat_fast.training.health", "cat_fast.training.metrics"}
    assert set(find_cycle({**edges, watchdog: {guard}})) == {guard, log, watchdog}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("cat_fast.complexity.ratios.choose", "from cat_fast.tokenizer import NestedAutoencoderKL"),
        ("cat_fast.tokenizer.losses", "import cat_fast.training.loop"),
        ("cat_fast.tokenizer.losses", "def late():\n    from cat_fast import evaluation"),
        ("cat_fast.inference.pipeline.cat_pipeline", "if TYPE_CHECKING:\n    from ...training import loop"),
        ("cat_fast.generator.__init__", "from ..inference import CATPipeline"),
        ("cat_fast.generator.dit", "from cat_fast import NestedAutoencoderKL"),
        ("cat_fast.tokenizer.blocks", "from kernels.group_norm_silu.op import group_norm_silu"),
        ("cat_fast.kernels.adaln.op", "from cat_fast.packing import PackedSequence"),
        ("cat_fast.console", "from cat_fast.data import files"),
    ],
)
def test_an_upward_import_is_found(name, source):
    assert len(violations(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("cat_fast.train", "from cat_fast.training import loop"),
        ("cat_fast.generator.dit", "from cat_fast.kernels.varlen_attention.op import varlen_attention"),
        ("cat_fast.kernels.adaln.op", "from .. import backends\nfrom .reference import adaln_reference"),
        ("cat_fast.kernels.backends", "from cat_fast.errors import UserError"),
        ("cat_fast.cli.main", "from cat_fast import __version__\nimport torch"),
    ],
)
def test_a_downward_import_is_allowed(name, source):
    assert violations(name, source) == []
