"""Examples in the documents run; every command, path and link in them exists."""

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from cat_fast import __version__
from cat_fast.cli.main import app
from cat_fast.config import fill, read_yaml
from cat_fast.training.config.runs import RUNS

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING, CHANGELOG = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
)
DOCUMENTS = {"README.md": README, "CONTRIBUTING.md": CONTRIBUTING}
DECISIONS = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, contents) of every fenced block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def code(text: str) -> str:
    """Return the fenced and inline code of a document."""
    fenced = [content for _, content in blocks(text)]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    # a span may be broken over two lines, as prose is
    return "\n".join([*fenced, *(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))])


def sessions(text: str) -> list[tuple[str, str]]:
    """Return (command, output shown) of every `$ command` in console blocks."""
    consoles = "".join(content for language, content in blocks(text) if language == "console")
    parts = re.split(r"^\$ (.*)\n", consoles, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def run(*command: str, folder: Path) -> str:
    """Return a command's standard output on an 80-column terminal, without trailing spaces."""
    environment = os.environ | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", cwd=folder, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return re.sub(r" +$", "", done.stdout, flags=re.MULTILINE)


def python_examples() -> list[tuple[str, str]]:
    """Return (example, output) of every Python block; the output is a text block directly after it."""
    found = [*blocks(README), ("", "")]
    return [
        (content, output if language == "text" else "")
        for (kind, content), (language, output) in pairwise(found)
        if kind == "python"
    ]


def test_there_is_a_python_example_of_fifteen_lines():
    ((example, _),) = python_examples()
    lines = [line for line in example.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 15
    for name in (
        "NestedAutoencoderKL",
        "DiT",
        "PackedSequence",
        "TokenBudgetPacker",
        "RatioThresholds",
        "Description",
    ):
        assert name in example


@pytest.mark.parametrize(("example", "output"), python_examples())
def test_python_examples_print_the_output_shown(example, output, tmp_path):
    assert run(sys.executable, "-c", example, folder=tmp_path) == output


def test_commands_are_in_console_blocks_and_scores_with_their_output_among_them():
    """Elsewhere they would not be compared with their output."""
    shown = sessions(README)
    assert [command for command, _ in shown] == re.findall(r"^\$ (.*)$", README, re.MULTILINE)
    scores = [output for command, output in shown if command.startswith("cat-fast score")]
    assert len(scores) >= 2
    assert all("thresholds" in output for output in scores)


@pytest.mark.parametrize(
    ("command", "output"), [s for s in sessions(README) if s[0].startswith("cat-fast score")]
)
def test_scores_match_the_output_shown(command, output, tmp_path):
    start = "from cat_fast.cli.main import main; main()"
    assert run(sys.executable, "-c", start, *shlex.split(command)[1:], folder=tmp_path) == output


@pytest.mark.parametrize("text", DOCUMENTS.values(), ids=DOCUMENTS)
def test_make_targets_exist(text):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code(text)))
    assert named
    assert named <= targets


def test_cat_fast_commands_and_their_options_exist():
    commands = typer.main.get_command(app).commands
    lines = re.findall(r"\bcat-fast (\w.*)", code(README))
    assert {line.split()[0] for line in lines} - {"COMMAND"} == set(commands)
    for line in lines:
        name, *rest = re.sub(r'"[^"]*"', "", line).split()
        command = commands.get(name)
        if rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]
        known = {option for p in command.params for option in p.opts} if command else set()
        assert {word for word in rest if word.startswith("-")} <= known | {"--help"}, line


def test_training_commands_name_a_config_and_keys_of_it():
    commands = re.findall(r"^\$ deepspeed .*--module cat_fast.train (.*)$", README, re.MULTILINE)
    assert commands
    for command in commands:
        path, *overrides = shlex.split(command)
        values = read_yaml(ROOT / path)
        fill(RUNS[values["task"]], values, overrides)


@pytest.mark.parametrize("text", [*DOCUMENTS.values(), DECISIONS], ids=[*DOCUMENTS, "decisions"])
def test_paths_exist(text):
    start = r"(?<![\w/.-])(?:cat_fast|kernels|csrc|configs|tests|scripts|benchmarks|docs|\.ci)/"
    named = set(re.findall(rf"{start}[\w./<>*-]*", code(text)))
    assert named
    assert [path for path in sorted(named) if not set(path) & set("<>*") and not (ROOT / path).exists()] == []


def links(text: str) -> list[str]:
    """Return the targets of links and images that are files of the repository."""
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize(
    ("document", "target"), [(name, target) for name, text in DOCUMENTS.items() for target in links(text)]
)
def test_links_and_images_exist(document, target):
    assert (ROOT / target).exists(), f"{document} shows {target}, which is missing"


@pytest.mark.parametrize("text", DOCUMENTS.values(), ids=DOCUMENTS)
def test_every_package_is_listed(text):
    packages = [init.parent.name for init in (ROOT / "cat_fast").glob("*/__init__.py")]
    assert len(packages) > 5
    assert [package for package in packages if not re.search(rf"\b{package}\b", code(text))] == []


def test_the_changelog_has_this_version():
    assert re.search(rf"^## \[{re.escape(__version__)}\]", CHANGELOG, re.MULTILINE)
