"""`cat-fast eval classification` on scikit-learn's digits, enlarged."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from cat_fast.cli.main import app
from cat_fast.training.loop import EXPORT
from cat_fast.training.probe.task import PREDICTIONS
from tests.cli.conftest import tiny_tokenizer
from tests.training.rank_processes import run_ranks

COUNT = 160


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits 0 and 1, 8 x 8, as images of 64 px."""
    root = tmp_path_factory.mktemp("digits")
    found = load_digits(n_class=2)
    for number, (image, label) in enumerate(zip(found.images[:COUNT], found.target, strict=False)):
        folder = root / ("test" if number % 4 == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        enlarged = Image.fromarray((image * 15.9).astype("uint8")).resize((64, 64))
        enlarged.save(folder / f"{number:03d}.png")
    tiny_tokenizer(initialisation="pyramid").save_pretrained(root / "tokenizer")
    return root


@pytest.fixture
def fast_launch(monkeypatch):
    """Train in a process of the session instead of the launcher; return the started configurations."""
    started = []

    def launch(config, overrides, *, run_folder, log, ranks, on_step):
        started.append((config.name, overrides))
        more = ["optimizer.lr=0.01"]  # the paper's rate needs more than these few steps
        run_ranks("tests.training.runs:train_as_rank", ranks, str(config), *overrides, *more)

    monkeypatch.setattr("cat_fast.training.launch.launch", launch)
    return started


def run(digits, out, *arguments):
    options = {"--data": digits, "--tokenizer": digits / "tokenizer", "--size": 64, "--out": out}
    flat = [str(part) for option in options.items() for part in option]
    return CliRunner().invoke(app, ["eval", "classification", *flat, *arguments])


def test_linear_probes(digits, tmp_path, fast_launch):
    found = run(digits, tmp_path, "--ratios", "8,32", "--epochs", "10", "--json")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    rows = {(row["name"], row["head"]): row for row in result["rows"]}
    assert list(rows) == [
        ("ours 8x", "flattened"), ("ours 8x", "pooled"), ("ours 32x", "flattened"), ("ours 32x", "pooled"),
        ("pixels", "flattened"), ("untrained 8x", "flattened"),
    ]  # fmt: skip
    width = 4 * (64 // 8) ** 2
    for (_, head), row in rows.items():
        assert row["head_inputs"] == (width if head == "flattened" else 4)
        assert row["head_weights"] == 2 * row["head_inputs"]
        low, high = row["accuracy"]["interval"]
        assert low <= row["accuracy"]["value"] <= high
        assert row["test_images"] == COUNT // 4
    assert rows["pixels", "flattened"]["accuracy"]["value"] > 0.9
    assert rows["ours 8x", "flattened"]["accuracy"]["value"] > 0.9
    steps = 10 * -(-(COUNT - COUNT // 4) // 64)
    for config, overrides in fast_launch:
        assert config == "linear.yaml"
        assert {f"schedule.total_steps={steps}", "schedule.warmup_steps=4"} <= set(overrides)
    launched = len(fast_launch)
    again = run(digits, tmp_path, "--ratios", "8,32", "--epochs", "10", "--json")
    assert len(fast_launch) == launched, "finished heads are not trained again"
    assert {**json.loads(again.stdout), "timing": 0} == {**result, "timing": 0}
    other = run(digits, tmp_path, "--ratios", "8,32", "--epochs", "5")
    assert other.exit_code == 2
    assert "other settings" in other.stderr


def test_fine_tuning(digits, tmp_path, fast_launch):
    options = ("--ratios", "16", "--epochs", "1", "--task", "finetune")
    found = run(digits, tmp_path / "out", *options)
    assert found.exit_code == 0, found.output
    assert [config for config, _ in fast_launch] == ["finetune.yaml"] * 2
    assert [overrides[-1] for _, overrides in fast_launch] == ["pooled=false", "pooled=true"]
    result = json.loads((tmp_path / "out" / "classification.json").read_text())
    assert [row["head"] for row in result["rows"]] == ["flattened", "pooled"]
    assert result["task"] == "finetune"
    again = run(digits, tmp_path / "out", *options, "--json")
    assert len(fast_launch) == 2, "finished heads are not trained again"
    assert json.loads(again.stdout)["rows"] == result["rows"]
    tiny_tokenizer(seed=1).save_pretrained(tmp_path / "other")
    other = run(digits, tmp_path / "out", *options, "--tokenizer", str(tmp_path / "other"))
    assert other.exit_code == 2
    assert "other settings (tokenizer: " in " ".join(other.stderr.split())
    assert len(fast_launch) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "knn"), "--task knn: expected linear or finetune"),
        (("--size", "40"), "--size 40: expected a multiple of 32"),
        (("--scores", "missing.parquet"), "--scores missing.parquet: cannot be read (No such file"),
        (("--ratios", "budget=9"), "a budget needs all images at once"),
    ],
)
def test_arguments_are_checked(digits, tmp_path, arguments, message, fast_launch):
    found = run(digits, tmp_path, "--ratios", "8", *arguments)
    assert found.exit_code == 2
    assert message in " ".join(found.stderr.split())
    assert not fast_launch


@pytest.fixture
def certain(monkeypatch):
    """Heads that predict every label, without training."""

    def launch(config, overrides, *, run_folder, **options):
        test = Path(dict(part.split("=", 1) for part in overrides)["data.test"])
        predictions = run_folder / EXPORT / PREDICTIONS
        predictions.parent.mkdir(parents=True)
        np.save(predictions, np.load(test / "labels.npy"))

    monkeypatch.setattr("cat_fast.training.launch.launch", launch)


def test_scores_that_change_in_their_file_are_not_taken_for_the_same(digits, tmp_path, certain):
    train, test = (sorted(path.name for path in (digits / s).rglob("*.png")) for s in ("train", "test"))
    scores, options = tmp_path / "scores.jsonl", ("--ratios", "8,adaptive", "--no-references")

    def write(score, names):
        rows = [{"key": Path(name).stem, "score": score} for name in names]
        scores.write_text("\n".join(map(json.dumps, rows)))

    write(2, train + test[1:])
    found = run(digits, tmp_path / "out", *options, "--scores", str(scores))
    assert found.exit_code == 1, "an image is left out by the second rule alone"
    assert "no score" in found.stderr
    row = json.loads((tmp_path / "out" / "classification.json").read_text())["rows"][2]
    assert (row["name"], row["distribution"]) == ("ours adaptive", {"32": 1.0})
    write(5, train + test[1:])
    found = run(digits, tmp_path / "out", *options, "--scores", str(scores))
    assert found.exit_code == 2
    assert "other settings" in " ".join(found.stderr.split())


def test_columns_of_one_name_are_refused(digits, tmp_path, fast_launch):
    found = run(digits, tmp_path, "--ratios", "8", "--baseline", f"ours={digits / 'tokenizer'}@8")
    assert found.exit_code == 2
    assert "two columns are named 'ours 8x'" in " ".join(found.stderr.split())
    assert not (tmp_path / "features").exists()
