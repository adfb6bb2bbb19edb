"""Commands in docs/sampling.md, data.md, scoring.md and inference.md exist, with their options or keys."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from cat_fast.cli.main import app
from cat_fast.config import fill, read_yaml
from cat_fast.generator import DiT, paper_schedule
from cat_fast.inference import CATPipeline
from cat_fast.training.config.runs import RUNS
from tests.cli.conftest import tiny_tokenizer
from tests.test_readme import blocks, links, sessions

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "docs" / name for name in ("sampling.md", "data.md", "scoring.md", "inference.md")]
COMMANDS = [line for path in DOCUMENTS for line, _ in sessions(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("line", [line for line in COMMANDS if "configs/" in line])
def test_a_training_names_a_config_and_keys_of_it(line):
    script, path, *overrides = shlex.split(line)
    assert (ROOT / script).is_file()
    values = read_yaml(ROOT / path)
    assert fill(RUNS[values["task"]], values, overrides).output_dir


@pytest.mark.parametrize("line", [line for line in COMMANDS if "configs/" not in line])
def test_a_command_and_its_options_exist(line):
    program, name, *words = shlex.split(line)
    assert program == "cat-fast"
    known = {option for p in typer.main.get_command(app).commands[name].params for option in p.opts}
    assert {word for word in words if word.startswith("-")} <= known


@pytest.fixture
def demo_pipeline(tmp_path, monkeypatch):
    """A pipeline with random weights at the place where the demo writes its own."""
    tokenizer = tiny_tokenizer()
    transformer = DiT(in_channels=4, hidden_size=32, depth=1, num_heads=2, num_classes=2, position_frame=32)
    pipeline = CATPipeline(tokenizer, transformer, paper_schedule(), labels=["sky", "text"], resolution=128)
    pipeline.save_pretrained(tmp_path / "runs/demo/pipeline")
    monkeypatch.chdir(tmp_path)


def python_blocks(document):
    return [text for kind, text in blocks(document.read_text(encoding="utf-8")) if kind == "python"]


@pytest.mark.usefixtures("demo_pipeline")
def test_python_examples_run():
    (example,) = python_blocks(DOCUMENTS[0])
    values = {}
    exec(example.replace("num_inference_steps=30", "num_inference_steps=2"), values)
    assert values["output"].images.shape == (2, 3, 128, 128)


@pytest.mark.usefixtures("demo_pipeline")
def test_the_example_of_the_engine_runs():
    example = python_blocks(DOCUMENTS[3])[0]
    assert "(10, 50)" in example
    values = {}
    exec(example.replace("(10, 50)", "(1, 2)"), values)
    assert [image.shape for image in values["images"]] == [(3, 128, 128)] * 2


def test_options_that_the_text_names_exist():
    assert len(COMMANDS) > 5
    commands = typer.main.get_command(app).commands
    for path, names in zip(
        DOCUMENTS,
        (["sample", "pipeline"], ["encode-shards", "shard", "data"], ["score"], ["serve"]),
        strict=True,
    ):
        known = {option for name in names for option in _options(commands[name])}
        named = set(re.findall(r"`(--[a-z-]+)", path.read_text(encoding="utf-8")))
        assert named
        assert named <= known


@pytest.mark.parametrize(
    "target",
    [path.parent / target for path in DOCUMENTS for target in links(path.read_text(encoding="utf-8"))],
    ids=str,
)
def test_links_lead_somewhere(target):
    assert target.exists()


def _options(command) -> list[str]:
    """Return the options of a command and its subcommands."""
    inside = [option for one in getattr(command, "commands", {}).values() for option in _options(one)]
    return inside + [option for p in command.params for option in (*p.opts, *p.secondary_opts)]
