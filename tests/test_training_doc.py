"""The commands, keys, files and links in docs/training.md exist."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from cat_fast.config import fill, read_yaml
from cat_fast.training.config.runs import RUNS
from tests.test_readme import blocks, code, links

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs/training.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```$", "", DOCUMENT, flags=re.DOTALL | re.MULTILINE)
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", PROSE)]


def commands() -> list[str]:
    consoles = "".join(content for language, content in blocks(DOCUMENT) if language == "console")
    return re.findall(r"^\$ (.*)$", consoles, re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in commands() if "configs/" in c])
def test_commands_use_existing_configs_and_keys(command):
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.startswith("configs/"))
    values = read_yaml(ROOT / words[at])
    config = fill(RUNS[values["task"]], values, words[at + 1 :])
    assert config.output_dir


def keys(kind: type, prefix: str = "") -> set[str]:
    """Return every dotted key of a configuration, including sections."""
    found = set()
    for field in dataclasses.fields(kind):
        found.add(prefix + field.name)
        if dataclasses.is_dataclass(field.type):
            found |= keys(field.type, f"{prefix}{field.name}.")
    return found


KNOWN = set().union(*map(keys, RUNS.values()))
FILES = (".json", ".jsonl", ".png", ".yaml", ".parquet", ".tar", ".md")


def named_keys() -> list[str]:
    """Return spans that look like keys: `section.key`, with or without a value, or `key=value`."""
    found = set()
    for span in SPANS:
        name, value, _ = re.match(r"([a-z_.\d]*)(=?)(.*)", span).groups()
        top = value and re.fullmatch(r"[a-z_]+", name) and span != "key=value"
        dotted = re.fullmatch(r"[a-z_]+(\.[a-z_\d]+)+", name) and not name.endswith(FILES)
        if top or dotted:
            found.add(name)
    return sorted(found)


@pytest.mark.parametrize("key", named_keys())
def test_key_exists(key):
    assert key in KNOWN


def test_keys_are_found_in_the_text():
    assert {"data.batch_size", "schedule.total_steps", "world_size"} <= set(named_keys())
    assert not {name for name in named_keys() if name.isupper()}


def test_paths_exist():
    start = r"(?<![\w/.-])(?:cat_fast|configs|tests|scripts|benchmarks|docs|deepspeed)/"
    named = set(re.findall(rf"{start}[\w./-]*\w", code(DOCUMENT)))
    assert len(named) > 10
    missing = [
        path for path in named if not (ROOT / path).exists() and not (ROOT / "configs" / path).exists()
    ]
    assert sorted(missing) == []


@pytest.mark.parametrize("target", links(DOCUMENT))
def test_links_and_images_have_targets(target):
    assert (ROOT / "docs" / target).exists()


def test_links_within_the_page_name_a_heading():
    headings = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", DOCUMENT, re.MULTILINE)
    }
    targets = re.findall(r"\]\(#([^)]+)\)", DOCUMENT)
    assert targets
    assert set(targets) <= headings
