"""The operators' READMEs: every operator has one, and the files, links and tests that they name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "kernels").glob("*/op.py"))
READMES = sorted([*ROOT.glob("kernels/*/README.md"), *ROOT.glob("csrc/*/README.md")])
DOCUMENTS = [ROOT / "docs/kernels.md", *READMES]
TESTS = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))


def relative(path):
    return str(path.relative_to(ROOT))


def test_every_operator_has_a_readme():
    assert len(FOLDERS) == 7
    assert [relative(folder) for folder in FOLDERS if not (folder / "README.md").is_file()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_files_links_and_tests_exist(document):
    text = document.read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    assert [target for target in links if not (document.parent / target).exists()] == []
    paths = re.findall(r"`((?:benchmarks|cat_fast|csrc|kernels|scripts|tests)/[\w./]+)`", text)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in TESTS] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=relative)
def test_readmes_list_every_source(folder):
    named = set(re.findall(r"`(?:[\w/]+/)?(\w+\.\w+)`", (folder / "README.md").read_text(encoding="utf-8")))
    sources = [*folder.glob("*.py"), *(ROOT / "csrc" / folder.name).glob("*.*")]
    assert {path.name for path in sources} - {"__init__.py"} <= named
