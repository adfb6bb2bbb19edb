"""The `cat-fast` command: help with examples, exit codes, and start-up without importing torch."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer
from typer.testing import CliRunner

from cat_fast.cli.main import app

HEAVY = ("torch", "numpy", "scipy", "diffusers", "transformers", "deepspeed", "sklearn", "matplotlib")


@pytest.mark.parametrize(
    "command",
    [
        *("demo", "score", "encode", "encode-shards", "decode", "pipeline", "sample", "serve", "fetch"),
        *("runs", "info"),
    ],
)
def test_every_command_has_help_with_an_example(cat_fast, command):
    result = cat_fast(command, "--help")
    assert result.exit_code == 0
    assert f"cat-fast {command}" in result.stdout.split("Example")[1]
    assert command in cat_fast("--help").stdout


def test_help_has_no_text_that_markdown_drops():
    """Outside code, `<text>` is an HTML tag, which is not shown."""
    commands, options = [typer.main.get_command(app)], []
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        options += command.params
    assert len(options) > 100
    for option in options:
        outside = re.sub("`[^`]*`", "", getattr(option, "help", None) or "")
        assert "<" not in outside, option.name


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["encode", "--help"],
        ["encode-shards", "--help"],
        ["sample", "--help"],
        ["pipeline", "--help"],
        ["--version"],
        ["encode", "x", "-c", "x", "--ratio", "7"],
    ],
)
def test_help_and_usage_errors_do_not_import_torch(args):
    script = (
        "import sys\n"
        "from cat_fast.cli.main import app\n"
        f"try:\n    app({args!r})\nexcept SystemExit:\n    pass\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert finished.stdout.splitlines()[-1] == "[]"


def test_version(cat_fast):
    assert cat_fast("--version").stdout == f"cat-fast {version('cat-fast')}\n"


def test_usage_errors_exit_with_2(cat_fast):
    for args in ([], ["no-such-command"], ["encode"], ["decode", "--no-such-option"]):
        assert cat_fast(*args).exit_code == 2


def test_user_error_is_one_line_with_exit_code_2(tmp_path):
    script = "from cat_fast.cli.main import main; main()"
    command = [sys.executable, "-c", script, "encode", str(tmp_path), "-c", str(tmp_path / "no")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith(f"error: {tmp_path}: the folder contains no image")
    assert finished.stderr.count("\n") == 1


def test_internal_error_is_not_reported_as_a_user_error():
    @app.command("fail-for-test", hidden=True)
    def fail() -> None:
        raise ZeroDivisionError("internal error")

    try:
        result = CliRunner().invoke(app, ["fail-for-test"])
    finally:
        app.registered_commands.pop()
    assert isinstance(result.exception, ZeroDivisionError)
    assert typer.__name__ not in result.stderr
