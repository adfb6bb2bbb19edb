"""`python -m cat_fast.train` on invalid input: one error line, exit code 2, without importing torch first."""

import subprocess
import sys

import pytest

from cat_fast.training.config.runs import RUNS

MINIMAL = "task: tokenizer\noutput_dir: {out}\n"


def train(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cat_fast.train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def errors(finished: subprocess.CompletedProcess) -> list[str]:
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    return [line for line in finished.stderr.splitlines() if line.startswith("error")]


def test_a_missing_configuration_is_reported_without_importing_torch(tmp_path):
    script = (
        "import sys\nfrom cat_fast.train import main\n"
        f"code = main([{str(tmp_path / 'no.yaml')!r}])\n"
        "print(code, sorted({'torch', 'deepspeed', 'diffusers'} & set(sys.modules)))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert finished.stdout == "2 []\n"
    assert finished.stderr == f"error: configuration {tmp_path / 'no.yaml'}: no such file\n"


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("task: classifier\n", [], f"task 'classifier' is not one of {', '.join(RUNS)}"),
        (MINIMAL, ["data.image_sise=64"], "'data.image_sise'; did you mean 'data.image_size'?"),
    ],
)
def test_an_invalid_configuration_is_reported_in_one_line_and_writes_nothing(
    tmp_path, text, override, message
):
    config, out = tmp_path / "run.yaml", tmp_path / "out"
    config.write_text(text.format(out=out))
    (line,) = errors(train(config, *override))
    assert line.startswith(f"error: configuration {config}: ")
    assert line.endswith(message)
    assert not out.exists()


def test_errors_of_other_ranks_than_0_name_the_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    (line,) = errors(train(tmp_path / "no.yaml"))
    assert line.startswith("error (rank 1): configuration")
