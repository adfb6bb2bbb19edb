"""`cat-fast dual encode`, `decode`, `generate`: runs resume to the same bits, and errors are named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cat_fast.dual_token.language.model import DualLanguageModel
from cat_fast.dual_token.rerender.open import open_backend
from cat_fast.dual_token.tokenizer import DualTokenizer, Renderer
from cat_fast.kernels.linear import op as linear_op
from tests.cli.conftest import assert_one_line_error, parse_json
from tests.dual_token.conftest import tiny_guide
from tests.dual_token.rerender.conftest import cat_pipelines  # noqa: F401 # a fixture
from tests.dual_token.semantic.test_model import tiny_semantic
from tests.kernels.onednn import needs_onednn

ROOT = Path(__file__).parents[2]
CAPTIONS = ["a red house", "a blue sky", "newspaper page", "a house", "blue", "red page", "sky", "a page"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory, cat_pipelines):  # noqa: F811
    """Folder with a tokenizer that has a diffusion model, a language model, and captions."""
    folder = tmp_path_factory.mktemp("parts")
    pipeline = cat_pipelines["epsilon"]
    target = open_backend(str(pipeline), "cpu").text_target
    semantic = tiny_semantic(text_width=target.width, text_fingerprint=target.fingerprint())
    tokenizer = DualTokenizer(tiny_guide(), semantic, Renderer(model=str(pipeline)), max_side=4)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(3)
    language = DualLanguageModel(
        len(tokenizer.vocabulary),
        16,
        24,
        1,
        2,
        target.width,
        64,
        tokenizer_fingerprint=tokenizer.fingerprint(),
    )
    language.save_pretrained(folder / "language")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS))
    (folder / "pipeline").write_text(str(pipeline))
    return folder


def generation(parts, out, *more):
    command = ["dual", "generate", "-m", parts / "language", "-c", parts / "tokenizer", "-o", out]
    command += ["--prompts", parts / "captions.txt", "--text-encoder", (parts / "pipeline").read_text()]
    return [*command, "--grids", "2,1x3", "--steps", "2", "--json", *more]


def evaluation(parts, photos):
    command = ["dual", "eval", "--data", photos, "-c", parts / "tokenizer", "--grids", "2"]
    return [*command, "--size", "64", "--steps", "1", "--sheet", "0"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


def fail_after(monkeypatch, owner, name, count):
    """Interrupt a run as Ctrl-C does, at call number `count` + 1 of a method."""
    real, calls = getattr(owner, name), []

    def counted(*args, **options):
        calls.append(name)
        if len(calls) > count:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.fixture
def tokens(cat_fast, parts, photos, tmp_path):
    file = tmp_path / "tokens.jsonl"
    result = cat_fast("dual", "encode", photos, "-c", parts / "tokenizer", "-o", file, "--grid", "2")
    assert result.exit_code == 0, result.output
    return file


@pytest.mark.parametrize("options", [["--steps", "2"], ["--guides"], ["--format", "jpg", "--steps", "1"]])
def test_an_interrupted_decoding_resumes(cat_fast, parts, tokens, tmp_path, monkeypatch, options):
    command = ["dual", "decode", tokens, "-c", parts / "tokenizer", *options]
    assert cat_fast(*command, "-o", tmp_path / "straight").exit_code == 0
    cut = tmp_path / "cut"
    cut.mkdir()
    suffix = "jpg" if "jpg" in options else "png"
    Image.new("RGB", (8, 8)).save(cut / f"c.{suffix}")  # of something else: must not count as decoded
    with monkeypatch.context() as patch:
        fail_after(patch, DualTokenizer, "decode_guides", 2)
        assert cat_fast(*command, "-o", cut).exit_code == 130
    assert sorted(path.stem for path in cut.glob(f"*.{suffix}")) == ["a", "b"]
    before = (cut / f"a.{suffix}").stat().st_mtime_ns
    os.truncate(cut / f"b.{suffix}", 100)
    calls = fail_after(monkeypatch, DualTokenizer, "decode_guides", 2)
    assert cat_fast(*command, "-o", cut).exit_code == 0
    assert len(calls) == 2
    assert contents(cut) == contents(tmp_path / "straight")
    assert (cut / f"a.{suffix}").stat().st_mtime_ns == before


def test_images_of_other_settings_are_refused(cat_fast, parts, tokens, tmp_path):
    command = ["dual", "decode", tokens, "-c", parts / "tokenizer", "-o", tmp_path / "out", "--steps", "1"]
    assert cat_fast(*command).exit_code == 0
    before = contents(tmp_path / "out")
    for option, words in (
        (["--strength", "0.5"], "settings.rendering.settings.strength"),
        (["--seed", "3"], "settings.rendering.seed"),
        (["--guides"], "settings.rendering"),
        (["--format", "webp"], "settings.format"),
    ):
        assert_one_line_error(cat_fast(*command, *option), "made with other settings", words)
    rows = [json.loads(line) for line in tokens.read_text().splitlines()]
    rows[1]["guide"][0][0] = (rows[1]["guide"][0][0] + 1) % 16
    del rows[1]["ids"]
    tokens.write_text("\n".join(map(json.dumps, rows)))
    assert_one_line_error(cat_fast(*command), "made with other settings", "images.b")
    assert contents(tmp_path / "out") == before


@needs_onednn
def test_the_library_of_matrix_products_is_recorded_and_kept(
    cat_fast, parts, photos, tokens, tmp_path, monkeypatch
):
    for command, plan, record in (
        (["dual", "decode", tokens, "-c", parts / "tokenizer", "--steps", "1"], "decoded.json", "settings"),
        (generation(parts, tmp_path)[:-1], "generated.json", "settings"),
        (evaluation(parts, photos), "settings.json", None),
    ):
        out = tmp_path / plan
        mine = [*command, "-o", out]
        assert cat_fast(*mine, "--linear-backend", "onednn").exit_code == 0
        stored = json.loads((out / plan).read_text())
        assert (stored[record] if record else stored)["linear_backend"] == "onednn"
        with monkeypatch.context() as patch:
            used = fail_after(patch, linear_op, "_product", 10**9)
            for file in (*out.glob("*.png"), *out.glob("*.jsonl")):
                file.unlink()
            assert cat_fast(*mine).exit_code == 0  # auto takes the recorded one
        assert used
        other = cat_fast(*mine, "--linear-backend", "mkl")
        assert_one_line_error(other, "made with other settings", "linear_backend")


@needs_onednn
def test_an_interrupted_encoding_keeps_its_library(cat_fast, parts, photos, tmp_path, monkeypatch):
    out = tmp_path / "cut.jsonl"
    command = ["dual", "encode", photos, "-c", parts / "tokenizer", "-o", out, "--grid", "2"]
    with monkeypatch.context() as patch:
        fail_after(patch, DualTokenizer, "encode", 2)
        assert cat_fast(*command, "--linear-backend", "onednn").exit_code == 130
    for option, encoded in (("auto", 1), ("mkl", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(linear_op, "calibrate", lambda: "mkl")
            calls = fail_after(patch, DualTokenizer, "encode", encoded)
            rows = tmp_path / ".cut.jsonl.rows"
            before = rows.read_bytes()
            assert cat_fast(*command, "--linear-backend", option).exit_code == 0
            assert len(calls) == encoded
            rows.write_bytes(before)


def test_the_dtype_of_the_diffusion_model_is_recorded(cat_fast, parts, tokens, tmp_path):
    command = ["dual", "decode", tokens, "-c", parts / "tokenizer", "--steps", "1"]
    for name, options in (("fp32", []), ("bf16", ["--dtype", "bf16"])):
        assert cat_fast(*command, "-o", tmp_path / name, *options).exit_code == 0
    found, expected = (json.loads((tmp_path / n / "decoded.json").read_text()) for n in ("bf16", "fp32"))
    assert (found["settings"].pop("dtype"), expected["settings"].pop("dtype")) == ("bfloat16", None)
    for plan in (found, expected):
        del plan["settings"]["renderer"]  # a hash of the weights, rounded or not
    assert found == expected
    assert json.loads((tmp_path / "bf16" / "execution.json").read_text())["dtype"] == "bfloat16"
    a, b = (Image.open(tmp_path / name / "a.png").tobytes() for name in ("bf16", "fp32"))
    assert a != b
    assert_one_line_error(cat_fast(*command, "-o", tmp_path / "bf16"), "made with other settings", "dtype")
    assert_one_line_error(cat_fast(*command, "-o", tmp_path / "x", "--dtype", "int8"), "--dtype int8")
    guides = [*command, "--guides", "--dtype", "bf16", "-o", tmp_path / "guides"]
    assert cat_fast(*guides).exit_code == 0
    assert json.loads((tmp_path / "guides" / "execution.json").read_text())["dtype"] == "float32"


def test_an_image_that_cannot_be_drawn_is_named_and_the_others_are_decoded(
    cat_fast, parts, tokens, tmp_path, monkeypatch
):
    broken = tmp_path / "tokenizer"
    shutil.copytree(parts / "tokenizer", broken)
    rows = [json.loads(line) for line in tokens.read_text().splitlines()]
    weights = broken / "guide" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    a, b, c = ({code for codes in row["guide"] for code in codes} for row in rows)
    state["quantizer.codebook"][list(b - a - c)] = float("nan")
    save_file(state, weights, {"format": "pt"})
    command = ["dual", "decode", tokens, "-c", broken, "-o", tmp_path / "out", "--steps", "1", "--force"]
    result = cat_fast(*command)
    assert result.exit_code == 1
    assert "error: b: " in result.stderr
    assert "NaN" in result.stderr
    assert "1 of 3 images failed; the others were decoded" in result.stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["a.png", "c.png"]
    again = parse_json(cat_fast(*command, "--json"))
    assert [row["file"] is None for row in again["images"]] == [False, True, False]
    state["quantizer.codebook"][:] = float("nan")
    save_file(state, weights, {"format": "pt"})
    command[6] = tmp_path / "none"
    assert cat_fast(*command).exit_code == 2
    assert not (tmp_path / "none" / "decoded.json").exists()


def test_an_interrupted_encoding_resumes(cat_fast, parts, photos, tokens, tmp_path, monkeypatch):
    out = tmp_path / "cut.jsonl"
    command = ["dual", "encode", photos, "-c", parts / "tokenizer", "-o", out, "--grid", "2"]
    with monkeypatch.context() as patch:
        fail_after(patch, DualTokenizer, "encode", 2)
        assert cat_fast(*command).exit_code == 130
    assert not out.exists()
    with (tmp_path / ".cut.jsonl.rows").open("a") as file:
        file.write('{"key": "c"')  # cut while it was written
    with monkeypatch.context() as patch:
        calls = fail_after(patch, DualTokenizer, "encode", 1)
        assert cat_fast(*command).exit_code == 0
    assert len(calls) == 1
    assert out.read_bytes() == tokens.read_bytes()
    assert not (tmp_path / ".cut.jsonl.rows").exists()
    with monkeypatch.context() as patch:
        fail_after(patch, DualTokenizer, "encode", 2)
        assert cat_fast(*command).exit_code == 130
    Image.new("RGB", (64, 64), "red").save(photos / "a.jpg")  # a changed image is encoded again
    calls = fail_after(monkeypatch, DualTokenizer, "encode", 3)
    assert cat_fast(*command).exit_code == 0
    assert len(calls) == 3
    assert out.read_bytes() != tokens.read_bytes()


def test_generated_images_are_those_of_their_tokens(cat_fast, parts, tmp_path):
    result = cat_fast(*generation(parts, tmp_path / "out"))
    found = parse_json(result)["images"]
    assert [row["caption"] for row in found] == CAPTIONS
    assert [row["error"] for row in found] == [None] * len(CAPTIONS)
    lines = [json.loads(line) for line in (tmp_path / "out" / "tokens.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == CAPTIONS
    assert {(len(line["guide"]), len(line["guide"][0])) for line in lines} <= {(2, 2), (1, 3)}
    command = ["dual", "decode", tmp_path / "out" / "tokens.jsonl", "-c", parts / "tokenizer", "--steps", "2"]
    assert cat_fast(*command, "-o", tmp_path / "again").exit_code == 0
    for row in found:
        name = Path(row["file"]).name
        assert (tmp_path / "again" / name).read_bytes() == Path(row["file"]).read_bytes()
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 8 * 64


def test_an_interrupted_generation_resumes(cat_fast, parts, tmp_path, monkeypatch):
    assert cat_fast(*generation(parts, tmp_path / "straight")).exit_code == 0
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        fail_after(patch, DualLanguageModel, "_embed", 3)
        assert cat_fast(*generation(parts, cut)).exit_code == 130
    with (cut / "tokens.jsonl").open("a") as file:
        file.write('{"key": "0003", "so')
    with monkeypatch.context() as patch:
        embedded = fail_after(patch, DualLanguageModel, "_embed", 5)
        fail_after(patch, DualTokenizer, "decode_batch", 4)
        assert cat_fast(*generation(parts, cut)).exit_code == 130
    assert len(embedded) == 5
    assert len(list(cut.glob("0*.png"))) == 4
    calls = fail_after(monkeypatch, DualTokenizer, "decode_batch", 4)
    assert cat_fast(*generation(parts, cut)).exit_code == 0
    assert len(calls) == 4
    assert contents(cut) == contents(tmp_path / "straight")
    assert_one_line_error(cat_fast(*generation(parts, cut, "--seed", "1")), "tokens made with other settings")
    assert contents(cut) == contents(tmp_path / "straight")


def test_a_killed_generation_resumes_to_the_same_bits(cat_fast, parts, tmp_path):
    environment = os.environ | {
        "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{ROOT}",
        "OMP_NUM_THREADS": "1",
    }
    options = ["--steps", "40"]
    assert cat_fast(*generation(parts, tmp_path / "straight", *options)).exit_code == 0
    start = [sys.executable, "-c", "from cat_fast.cli.main import main; main()"]
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        [*start, *map(str, generation(parts, cut, *options))], env=environment, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not list(cut.glob("0002.png")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in cut.glob("0*.png")}
    assert 3 <= len(kept) < len(CAPTIONS)
    assert cat_fast(*generation(parts, cut, *options)).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(cut) == contents(tmp_path / "straight")


def test_a_caption_that_is_too_long_is_named_and_the_others_are_drawn(cat_fast, parts, tmp_path):
    language = tmp_path / "language"
    shutil.copytree(parts / "language", language)
    config = json.loads((language / "config.json").read_text())
    captions = tmp_path / "captions.txt"
    captions.write_text("sky\na red house a blue sky\nhouse")
    semantic, guide = 4, 4
    limit = 4 + 1 + 1 + semantic + 1 + 2 + guide + 1  # three states of a word, and a sequence
    (language / "config.json").write_text(json.dumps(config | {"max_length": limit}))
    command = generation(parts, tmp_path / "out", "--prompts", captions, "-m", language, "--guides")
    result = cat_fast(*command)
    assert result.exit_code == 1, result.output
    errors = [row["error"] for row in parse_json(result)["images"]]
    assert [error is None for error in errors] == [True, False, True]
    assert "0001 (a red house a blue sky): language model: sequences are limited" in errors[1]
    assert sorted(path.name for path in (tmp_path / "out").glob("0*.png")) == ["0000.png", "0002.png"]


def test_impossible_generations_are_refused_in_one_line(cat_fast, parts, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"caption": "sky"}\n{"text": "sky"}\n')
    DualTokenizer(tiny_guide(seed=5), max_side=4).save_pretrained(tmp_path / "other")
    for more, words in (
        (["--prompts", tmp_path / "empty.txt"], ["empty.txt: contains no captions"]),
        (["--prompts", tmp_path / "bad.jsonl"], ["bad.jsonl: line 2: expected a caption"]),
        (["--prompts", tmp_path / "none.txt"], ["none.txt: cannot be read"]),
        (["-c", tmp_path / "other"], ["was trained with tokenizer"]),
        (["-m", parts / "tokenizer" / "guide"], ["GuideModel"]),
        (["-m", tmp_path / "nowhere"], ["nowhere: no such folder"]),
        (["--grids", "2,9x"], ["--grids"]),
        (["--strength", "2"], ["strength"]),
        (["--temperature", "inf", "-m", tmp_path / "nowhere"], ["temperature: expected", "got inf"]),
    ):
        assert_one_line_error(cat_fast(*generation(parts, tmp_path / "out", *more)), *words)
        assert not (tmp_path / "out").exists()
