"""`cat-fast sample`: a few images to look at, and many that survive being killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cat_fast.complexity import Description, RatioThresholds
from cat_fast.generator import DiT, paper_schedule
from cat_fast.inference import CATPipeline
from tests.cli.conftest import assert_one_line_error, parse_json, tiny_tokenizer
from tests.fake_compiler import compile_to
from tests.kernels.onednn import needs_onednn

ROOT = Path(__file__).parents[2]
LABELS = ["clear sky", "village street", "page, newspaper"]
DESCRIPTIONS = [
    Description("a clear blue sky"),
    Description("several people walking down a village street past shops and parked bicycles"),
    Description("a newspaper page with columns of text, tables and many photographs", True, True),
]
FAST = ["--steps", 3, "--scheduler", "ddim"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder of a pipeline with random weights, whose images are noise and differ."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    transformer = DiT(
        in_channels=4, hidden_size=48, depth=1, num_heads=2, num_classes=3, position_frame=4,
        tokenizer_fingerprint=tokenizer.fingerprint(),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    pipeline = CATPipeline(
        tokenizer,
        transformer,
        paper_schedule(),
        labels=LABELS,
        thresholds=RatioThresholds(3, 7),
        resolution=64,
        descriptions=DESCRIPTIONS,
    )
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


def images(folder):
    return [np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())]


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_all_classes_are_drawn_as_the_pipeline_draws_them(cat_fast, models, tmp_path):
    result = cat_fast("sample", "-p", models, "-o", tmp_path, *FAST, "--seed", 5, "--grid", "--npz")
    assert result.exit_code == 0, result.output
    generators = [torch.Generator().manual_seed(5 + i) for i in range(3)]
    drawn = CATPipeline.from_pretrained(models)(
        LABELS, num_inference_steps=3, scheduler="ddim", generator=generators
    )
    for got, expected in zip(images(tmp_path), drawn.images, strict=True):
        assert np.array_equal(got, np.asarray(expected))
    plan = json.loads((tmp_path / "samples.json").read_text())
    assert [one["prompt"] for one in plan["images"]] == LABELS
    assert [(one["label"], one["seed"]) for one in plan["images"]] == [(0, 5), (1, 6), (2, 7)]
    assert [(one["ratio"], one["tokens"]) for one in plan["images"]] == list(
        zip(drawn.ratios, drawn.tokens, strict=True)
    )
    assert plan["settings"]["guidance_scale"] == 1.5
    assert "3 images, 3 of them drawn now" in result.stdout
    stored = np.load(tmp_path / "samples.npz")
    assert (stored["arr_0"].dtype, stored["arr_0"].shape) == (np.uint8, (3, 64, 64, 3))
    assert np.array_equal(stored["arr_0"], np.stack(images(tmp_path)))
    assert stored["arr_1"].tolist() == [0, 1, 2]
    with Image.open(tmp_path / "grid.png") as sheet:  # cells twice as large, one row of three
        cell = np.asarray(sheet)[8 : 8 + 128, 8 : 8 + 128]
    assert np.array_equal(cell[::2, ::2], images(tmp_path)[0])


def test_guidance_of_some_channels_only(cat_fast, models, tmp_path):
    command = ["sample", "-p", models, *FAST, "--labels", 0, "--ratio", 8, "--guidance", 6]
    for name, option in {"all": [], "three": ["--guidance-channels", 3]}.items():
        assert cat_fast(*command, *option, "-o", tmp_path / name).exit_code == 0
    settings = json.loads((tmp_path / "three/samples.json").read_text())["settings"]
    assert settings["guidance_channels"] == 3
    (every,), (three,) = images(tmp_path / "all"), images(tmp_path / "three")
    assert not np.array_equal(every, three)
    (expected,) = CATPipeline.from_pretrained(models)(
        0, ratio=8, num_inference_steps=3, scheduler="ddim", guidance_scale=6, guidance_channels=3,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert np.array_equal(three, np.asarray(expected))
    refused = cat_fast(*command, "--guidance-channels", 5, "-o", tmp_path / "refused")
    assert_one_line_error(refused, "guidance_channels: expected 1 .. 4")
    assert not (tmp_path / "refused").exists()


def test_labels_are_names_or_numbers_and_names_may_hold_commas(cat_fast, models, tmp_path):
    labels = ["--labels", "page, newspaper", "-l", "0,village street"]
    summary = parse_json(
        cat_fast("sample", "-p", models, "-o", tmp_path, *labels, "--per-class", 2, *FAST, "--json")
    )
    plan = json.loads((tmp_path / "samples.json").read_text())
    assert [one["label"] for one in plan["images"]] == [2, 0, 1] * 2
    assert [one["prompt"] for one in plan["images"]][:2] == ["page, newspaper", "clear sky"]
    assert (summary["images"], summary["drawn_now"], summary["missing"]) == (6, 6, 0)
    assert summary["mean_tokens"] == np.mean([one["tokens"] for one in plan["images"]])


def test_a_budget_and_a_fixed_ratio(cat_fast, models, tmp_path):
    command = ["sample", "-p", models, *FAST, "--count", 7, "--json"]
    summary = parse_json(cat_fast(*command, "-o", tmp_path / "budget", "--mean-tokens", 6))
    assert summary["mean_tokens"] == 40 / 7  # of 7 * 6 = 42, no mix of 16, 4 and 1 costs more
    summary = parse_json(cat_fast(*command, "-o", tmp_path / "fixed", "--ratio", 32))
    assert summary["ratios"] == {"32": 7}


def test_a_second_run_draws_nothing_and_a_lost_image_comes_back_alone(cat_fast, models, tmp_path):
    command = [
        "sample",
        "-p",
        models,
        "-o",
        tmp_path,
        *FAST,
        "--count",
        9,
        "--max-tokens",
        64,
        "--npz",
        "--grid",
    ]
    assert cat_fast(*command).exit_code == 0
    before = contents(tmp_path)
    assert parse_json(cat_fast(*command, "--json"))["drawn_now"] == 0
    lost = tmp_path / "images/000004.png"
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    lost.unlink()
    assert parse_json(cat_fast(*command, "--json"))["drawn_now"] == 1
    assert contents(tmp_path) == before
    assert {path for path, at in times.items() if path.stat().st_mtime_ns != at} == {lost}


def test_ranks_share_the_work_and_the_last_one_writes_grid_and_npz(cat_fast, models, tmp_path):
    command = ["sample", "-p", models, *FAST, "--count", 9, "--max-tokens", 64, "--npz", "--grid", "--json"]
    parse_json(cat_fast(*command, "-o", tmp_path / "one"))
    many = [*command, "-o", tmp_path / "many", "--world-size", 2]
    first = parse_json(cat_fast(*many, "--rank", 1))
    assert 0 < first["drawn_now"] < 9
    assert (first["missing"], first["npz"]) == (9 - first["drawn_now"], None)
    last = parse_json(cat_fast(*many, "--rank", 0))
    assert (last["drawn_now"], last["missing"]) == (first["missing"], 0)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@needs_onednn
def test_the_library_of_matrix_products_is_recorded_and_kept(cat_fast, models, tmp_path):
    for name, option in (("ours", "onednn"), ("torchs", "mkl")):
        out = tmp_path / name
        options = ["sample", "-p", models, "--out", out, *FAST]
        assert cat_fast(*options, "--linear-backend", option).exit_code == 0
        recorded = json.loads((out / "samples.json").read_text())["settings"]["linear_backend"]
        assert recorded == option
        first, before = out / "images" / "000000.png", (out / "images" / "000000.png").read_bytes()
        first.unlink()
        assert cat_fast(*options).exit_code == 0  # auto takes the recorded one
        assert first.read_bytes() == before
        assert json.loads((out / "execution.json").read_text())["linear_backend"] == option
    other = "onednn" if option == "mkl" else "mkl"
    assert_one_line_error(cat_fast(*options, "--linear-backend", other), "made with other settings", "linear")


@pytest.mark.parametrize(("change", "tier"), [(1e-3, "fast"), (0.1, "exact")])
def test_the_decode_tier_in_use_is_recorded_and_kept(cat_fast, models, tmp_path, monkeypatch, change, tier):
    compile_to(monkeypatch, lambda images: images + change)
    options = ["sample", "-p", models, "--out", tmp_path, *FAST]
    result = cat_fast(*options, "--tier", "fast")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "execution.json").read_text())["decode_tier"] == tier
    recorded = json.loads((tmp_path / "samples.json").read_text())["settings"]["decode_tier"]
    assert recorded == (None if tier == "exact" else "fast")
    again = cat_fast(*options)
    if tier == "fast":
        assert_one_line_error(again, "made with other settings", "decode_tier: 'fast'")
    else:
        assert again.exit_code == 0


def test_a_killed_run_resumes_to_the_same_bits(models, tmp_path):
    """kill -9 after the first batches; existing images are not drawn again."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def command(out):
        start = [sys.executable, "-c", "from cat_fast.cli.main import main; main()", "sample"]
        options = ["--count", "30", "--max-tokens", "64", "--steps", "15", "--npz", "--json"]
        return [*start, "-p", str(models), "-o", str(out), *options]

    straight, cut = tmp_path / "straight", tmp_path / "cut"
    subprocess.run(command(straight), env=environment, check=True, capture_output=True)
    process = subprocess.Popen(command(cut), env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(cut.glob("images/*.png"))) < 8 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in cut.glob("images/*.png")}
    assert 8 <= len(kept) < 30
    again = subprocess.run(command(cut), env=environment, check=True, capture_output=True, text=True)
    assert json.loads(again.stdout)["drawn_now"] == 30 - len(kept)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    half_written = {name for name in contents(cut) if "/." in name}
    found = {name: content for name, content in contents(cut).items() if name not in half_written}
    assert found == contents(straight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--labels", "clear sk"], ["'clear sk' is none of the 3 classes", "clear sky"]),
        (["--labels", "3"], ["class 3", "0 .. 2"]),
        (["--ratio", 4], ["--ratio 4"]),
        (["--ratio", 16, "--mean-tokens", 4], ["expected ratio or mean_tokens"]),
        (["--mean-tokens", 0.5], ["mean_tokens is 0.5", "expected at least 1"]),
        (["--scheduler", "heun"], ["--scheduler heun", "dpm++"]),
        (["--scheduler", "euler"], ["'euler'", "expected 'ddpm'"]),
        (["--steps", 2000], ["got 2000", "1 .. 1000"]),
        (["--steps", 990, "--scheduler", "dpm++"], ["fewer than 990 distinct timesteps"]),
        (["--size", 96, "--ratio", 32], ["96 px", "multiple of 64", "such as 64 or 128"]),
        (["--size", "64x96", "--ratio", 32], ["height of 96 px", "multiple of 64"]),
        (["--size", 0], ["--size 0", "768x512"]),
        (["--size", "64x"], ["--size 64x"]),
        (["--labels", "0", "--descriptions", "x.txt"], ["got --labels and --descriptions"]),
        (["--labels", "0", "--prompt", "a cat"], ["got --labels and --prompt"]),
        (["--prompt", "a cat asleep on a mat"], ["'a cat asleep on a mat'", "trained without text"]),
        (["--count", 3, "--per-class", 2], ["got both"]),
        (["--descriptions", "nowhere.txt"], ["nowhere.txt", "cannot be read"]),
        (["--rank", 1], ["--rank 1"]),
        (
            ["--max-tokens", 8, "--ratio", 8],
            ["max_tokens 8 is too small: image 0 at 8x has 16 tokens, 32 with the", "to at least 32"],
        ),
        (["--max-tokens", 8, "--ratio", 8, "--guidance", 1], ["has 16 tokens; raise it to at least 16"]),
        (["--labels", "", "--count", 5], ["--labels '': expected class names", "such as 'clear sky'"]),
        (["--labels", ",", "-l", " "], ["--labels ',', ' ': expected class names or numbers"]),
        *((["--guidance", value], ["guidance_scale", "finite"]) for value in ("nan", "inf", "-inf")),
        *((["--mean-tokens", value], ["mean_tokens", "finite"]) for value in ("nan", "inf")),
        *((["--seed", seed], [f"seed {seed}: expected 0 to"]) for seed in (2**64, 2**64 - 2, 10**30)),
        (["--guidance", 1e300], ["guidance_scale 1e+300: expected a finite number"]),
        (["--guidance", "8=2,16"], ["--guidance 8=2,16: expected a number, or scales such as 8=2,16=3"]),
        (["--guidance", "8=2", "--ratio", 16], ["guidance: expected a scale for 16x, got {8: 2.0}"]),
        (["--device", "abacus"], ["abacus"]),
        (["-p", "nowhere"], ["nowhere is not a pipeline: no such folder"]),
    ],
)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(cat_fast, models, tmp_path, options, words):
    result = cat_fast("sample", "-p", models, "-o", tmp_path / "out", *options)
    assert_one_line_error(result, *words)
    assert not (tmp_path / "out").exists()


def test_the_largest_seed_is_usable(cat_fast, models, tmp_path):
    command = ["sample", "-p", models, "-o", tmp_path, *FAST, "--seed", 2**64 - 3]
    assert cat_fast(*command).exit_code == 0


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_weights_with_nan_leave_nothing_that_blocks_the_next_run(cat_fast, models, tmp_path, part):
    broken = tmp_path / "broken"
    shutil.copytree(models, broken)
    weights = broken / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file(
        {name: tensor.fill_(float("nan")) for name, tensor in tensors.items()}, weights, {"format": "pt"}
    )
    if part == "vae":  # its fingerprint is another one
        config = broken / "transformer/config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_fingerprint": None}))
    result = cat_fast("sample", "-p", broken, "-o", tmp_path / "out", *FAST)
    assert_one_line_error(result, "NaN or infinite values")
    assert not (tmp_path / "out").exists()
    assert cat_fast("sample", "-p", models, "-o", tmp_path / "out", *FAST).exit_code == 0


def test_cut_and_empty_images_are_drawn_again(cat_fast, models, tmp_path):
    command = ["sample", "-p", models, "-o", tmp_path, *FAST, "--grid", "--npz", "--json"]
    assert cat_fast(*command).exit_code == 0
    before = contents(tmp_path)
    os.truncate(tmp_path / "images/000000.png", 0)
    os.truncate(tmp_path / "images/000001.png", 1000)
    (tmp_path / "images/000002.png").write_bytes(b"\0" * 1000)
    assert parse_json(cat_fast(*command))["drawn_now"] == 3
    assert contents(tmp_path) == before


def test_non_square_images(cat_fast, models, tmp_path):
    command = ["sample", "-p", models, "-o", tmp_path, *FAST, "--size", "128x64", "--ratio", 16]
    summary = parse_json(cat_fast(*command, "--npz", "--grid", "--json"))
    assert (summary["width"], summary["height"], summary["ratios"]) == (128, 64, {"16": 3})
    assert (summary["mean_tokens"], summary["fixed_16x_tokens"]) == (8, 8)
    assert [image.shape for image in images(tmp_path)] == [(64, 128, 3)] * 3
    stored = np.load(tmp_path / "samples.npz")["arr_0"]
    assert np.array_equal(stored, np.stack(images(tmp_path)))
    with Image.open(tmp_path / "grid.png") as sheet:  # cells of the images' own size, one row of three
        assert np.array_equal(np.asarray(sheet)[8 : 8 + 64, 8 : 8 + 128], images(tmp_path)[0])


def test_images_may_be_written_to_the_folder_of_the_pipeline(cat_fast, models, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(models, copy)
    command = ["sample", "-p", copy, "-o", copy / "images of it", *FAST]
    assert cat_fast(*command).exit_code == 0
    assert parse_json(cat_fast(*command, "--json"))["drawn_now"] == 0
    assert parse_json(cat_fast("sample", "-p", copy, "-o", copy, *FAST, "--json"))["drawn_now"] == 3
    with (copy / "transformer/config.json").open("a") as file:
        file.write("\n")
    assert_one_line_error(cat_fast(*command), "other settings", "settings.pipeline")


def test_a_class_conditional_generator_refuses_descriptions(cat_fast, models, tmp_path):
    (tmp_path / "prompts.txt").write_text("clear sky\na cat asleep on a mat\n")
    result = cat_fast(
        "sample", "-p", models, "-o", tmp_path / "out", "--descriptions", tmp_path / "prompts.txt"
    )
    assert_one_line_error(result, "'a cat asleep on a mat'", "trained without text")


def test_other_settings_are_refused_and_nothing_is_lost(cat_fast, models, tmp_path):
    command = ["sample", "-p", models, "-o", tmp_path, *FAST]
    assert cat_fast(*command).exit_code == 0
    before = contents(tmp_path)
    assert_one_line_error(cat_fast(*command, "--guidance", 3), "other settings", "settings.guidance_scale")
    assert_one_line_error(cat_fast(*command, "--labels", "clear sky"), "other settings (images)")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("file", ["transformer/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_a_damaged_pipeline_is_named(cat_fast, models, tmp_path, file):
    copy = tmp_path / "copy"
    for name, content in contents(models).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content[:100] if name == file else content)
    assert_one_line_error(cat_fast("sample", "-p", copy, "-o", tmp_path / "out"), str(copy))
