"""`cat-fast eval reconstruction` on photographs, a page and a baseline, and its figures by hand."""

import html
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageFont
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from typer.testing import CliRunner

from cat_fast.cli.eval_reconstruction import parse_baseline
from cat_fast.cli.main import app
from cat_fast.data.images.io import image_to_tensor, load_image, resize_center_crop, tensor_to_image
from cat_fast.data.photographs import photographs
from cat_fast.errors import UserError
from cat_fast.evaluation.generation.checks import check_samples
from cat_fast.evaluation.images.sets import open_images
from cat_fast.evaluation.metrics import psnr, ssim
from cat_fast.evaluation.proxy import proxy_features
from cat_fast.evaluation.published.formats import FORMATS
from cat_fast.evaluation.published.tables import published
from cat_fast.evaluation.tokenizers.samples import open_samples
from cat_fast.models.load import load_tokenizer
from cat_fast.tokenizer.perceptual import STLPIPS
from tests.cli.conftest import tiny_tokenizer

SIZE = 64
COUNT = 22


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Twenty-one photographs and a page, their scores, and two tokenizers."""
    root = tmp_path_factory.mktemp("inputs")
    (root / "val").mkdir()
    names = []
    for number, photograph in enumerate(photographs("train")[: COUNT - 1]):
        names.append(f"{number:02d}")
        load_image(photograph.path).save(root / "val" / f"{names[-1]}.png")
    page = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(page).text((10, 60), "WORDS", "black", ImageFont.load_default(60))
    names.append("page")
    page.save(root / "val" / "page.png")
    scores = [
        {"key": f"{name}.png", "score": 1 + number % 9, "expected": 1.2 + number % 9}
        for number, name in enumerate(names)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(scores), root / "scores.parquet")
    tiny_tokenizer(initialisation="pyramid").save_pretrained(root / "tokenizer")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **blocks).save_pretrained(root / "kl")
    return root


def run(inputs, out, *arguments, data="val"):
    options = {
        "--data": inputs / data,
        "--tokenizer": inputs / "tokenizer",
        "--size": SIZE,
        "--features": "proxy",
        "--scores": inputs / "scores.parquet",
        "--out": out,
    }
    flat = [str(part) for option in options.items() for part in option]
    return CliRunner().invoke(app, ["eval", "reconstruction", *flat, *map(str, arguments)])


RULES = ("--ratios", "adaptive,16,equalized", "--no-ocr", "--no-faces")


@pytest.fixture(scope="module")
def result(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    found = run(inputs, out, *RULES, "--baseline", f"sd={inputs / 'kl'}", "--json")
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout), out


@pytest.fixture(scope="module")
def by_hand(inputs):
    """Originals, and our reconstructions at 16x as they would be saved."""
    files = sorted((inputs / "val").glob("*.png"))
    x = torch.stack([image_to_tensor(resize_center_crop(load_image(path), SIZE)) for path in files])
    with torch.no_grad():
        y = load_tokenizer(inputs / "tokenizer", "cpu")(x, 16).sample
    return x, torch.stack([image_to_tensor(tensor_to_image(image)) for image in y])


def test_metrics_are_those_of_the_saved_images(result, by_hand):
    x, y = by_hand
    metrics = result[0]["columns"]["ours 16x"]["metrics"]
    assert metrics["PSNR"]["value"] == pytest.approx(psnr(y, x).mean().item(), rel=1e-3)
    assert metrics["SSIM"]["value"] == pytest.approx(ssim(y, x).mean().item(), rel=1e-3)
    distance = STLPIPS.pretrained()(y, x).mean().item()
    assert metrics["st_lpips_alex"]["value"] == pytest.approx(distance, rel=1e-3)
    statistics = [fid_features_to_statistics(proxy_features([side]).double()) for side in (y, x)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert metrics["proxy-rFID-vgg16"]["value"] == pytest.approx(expected, rel=1e-3)
    for figure in metrics.values():
        low, high = figure["interval"]
        assert low < figure["value"] < high


def test_differences_from_the_published_protocol_are_recorded(result):
    found = result[0]["deviations"]
    assert [line.split(":")[0] for line in found] == [
        "features for rFID of an offline trunk or of other weights",
        f"{COUNT} images for 512 features",
        f"images of {SIZE} px instead of 512",
    ]


def test_columns_of_one_rate_agree_and_adaptive_mixes_them(result):
    columns = result[0]["columns"]
    assert list(columns) == ["ours adaptive", "ours 16x", "ours equalized", "sd 2x"]
    assert columns["ours equalized"]["metrics"] == columns["ours 16x"]["metrics"]
    mix = columns["ours adaptive"]["distribution"]
    assert set(mix) == {"8", "16", "32"}
    assert sum(mix.values()) == pytest.approx(1)
    positions = sum(share * (SIZE / int(ratio)) ** 2 for ratio, share in mix.items())
    adaptive = columns["ours adaptive"]
    assert adaptive["positions"] == pytest.approx(positions)
    assert adaptive["tokens"] == pytest.approx(positions / 4)
    assert adaptive["rms_side"] == pytest.approx(positions**0.5)
    assert adaptive["average_rate"] == pytest.approx(SIZE / positions**0.5)
    assert columns["sd 2x"]["positions"] == (SIZE // 2) ** 2
    assert columns["ours 16x"]["flops"] > 0


def test_one_row_per_image_and_column(result):
    table = pyarrow.parquet.read_table(result[1] / "images.parquet").to_pylist()
    assert len(table) == COUNT * 4
    chosen = {row["key"]: row["choice"] for row in table if row["column"] == "ours adaptive"}
    scores = {row["key"]: row["score"] for row in table}
    assert {scores[key] for key, choice in chosen.items() if choice == 8} == {8, 9}
    mean = np.mean([row["psnr"] for row in table if row["column"] == "ours 16x"])
    assert mean == pytest.approx(result[0]["columns"]["ours 16x"]["metrics"]["PSNR"]["value"])


def test_the_gallery_shows_the_worst_first(result):
    with Image.open(result[1] / "worst.png") as sheet:
        assert sheet.height > 20 * 100
        assert sheet.width > 5 * 100


def test_the_same_command_gives_the_same_json(result, inputs):
    before, out = result
    for suffix in ("parquet", "npz"):
        (out / "parts" / f"000000.{suffix}").unlink()
    found = run(inputs, out, *RULES, "--baseline", f"sd={inputs / 'kl'}", "--json")
    assert found.exit_code == 0
    assert {**json.loads(found.stdout), "timing": None} == {**before, "timing": None}


def test_the_sweep_of_an_evaluation(result):
    out = result[1]
    found = CliRunner().invoke(app, ["eval", "pareto", str(out)])
    assert found.exit_code == 0, found.output
    assert "2 of 2 rules are not dominated" in found.stdout or "1 of 2 rules" in found.stdout
    points = json.loads((out / "pareto.json").read_text())["points"]
    assert {(point["tokenizer"], point["rule"]) for point in points} == {("ours", "16x"), ("sd", "2x")}
    with Image.open(out / "pareto.png") as image:
        assert image.width > 800
    missing = CliRunner().invoke(app, ["eval", "pareto", str(out / "parts")])
    assert missing.exit_code == 2
    assert "run cat-fast eval reconstruction first" in " ".join(missing.stderr.split())


@pytest.mark.parametrize("kind", FORMATS)
def test_tables_with_our_rows(result, tmp_path, kind):
    out = tmp_path / "table"
    arguments = ["all", "--runs", f"photographs={result[1]}", "--format", kind, "--out", str(out)]
    found = CliRunner().invoke(app, ["eval", "table", *arguments])
    assert found.exit_code == 0, found.output
    text = out.read_text()
    for table in published().values():
        if kind != "csv":
            assert html.escape(table.title) in text or table.title in text, table.name
    assert "this project, ours adaptive" in text
    assert "0.37 here and 0.53" in (found.stderr if kind == "csv" else text)


def test_tables_are_listed():
    found = CliRunner().invoke(app, ["eval", "table"])
    assert found.exit_code == 0
    assert all(name in found.stdout for name in published())


def test_a_folder_of_other_settings_is_refused(result, inputs):
    found = run(inputs, result[1], "--ratios", "8", "--no-ocr", "--no-faces")
    assert found.exit_code == 2
    assert "other settings" in found.stderr


def test_text_and_faces(inputs, tmp_path):
    pytest.importorskip("pytesseract")
    data = tmp_path / "pages"
    data.mkdir()
    for name in ("page", "00"):
        (data / f"{name}.png").write_bytes((inputs / "val" / f"{name}.png").read_bytes())
    out = tmp_path / "out"
    found = run(inputs, out, "--ratios", "8", "--size", 128, "--workers", 1, data=data)
    assert found.exit_code == 0, found.output
    for heading in ("proxy-rFID-vgg16", "OCR-confidence", "faces-found-again", "average rate"):
        assert heading in found.stdout
    metrics = json.loads((out / "reconstruction.json").read_text())["columns"]["ours 8x"]["metrics"]
    if metrics["CER-originals-without-words"] == 1:
        assert metrics["CER"]["interval"] is None, "one page has no interval"
    assert metrics["CER-originals-without-words"] in (0, 1)
    assert metrics["OCR-confidence-originals"] > 50
    assert sum(one["words"] for one in metrics["CER-by-relative-height"]) >= 1
    assert metrics["images-without-faces"] + (metrics["faces"] > 0) >= 1


def test_unusable_and_unscored_images_are_left_out_by_name(inputs, tmp_path):
    data = tmp_path / "val"
    data.mkdir()
    for name in ("00.png", "01.png", "02.png"):
        (data / name).write_bytes((inputs / "val" / name).read_bytes())
    (data / "03.png").write_bytes(b"damaged")
    (data / "unscored.png").write_bytes((inputs / "val" / "00.png").read_bytes())
    out = tmp_path / "out"
    found = run(inputs, out, "--ratios", "adaptive,32", "--no-ocr", "--no-faces", "--save-images", data=data)
    assert found.exit_code == 1
    skipped = json.loads((out / "reconstruction.json").read_text())["data"]["skipped"]
    assert [entry["name"] for entry in skipped] == ["unscored.png", "03.png"]
    assert "no score in" in skipped[0]["why"]
    table = pyarrow.parquet.read_table(out / "images.parquet")
    assert table.num_rows == 3 * 2
    saved = sorted(path.name for path in (out / "images" / "ours-32").iterdir())
    assert saved == ["00.png", "01.png", "02.png"]
    with pytest.raises(UserError, match="these are reconstructions"):
        check_samples(open_images(out / "images" / "ours-32"))


def test_packaged_photographs_are_the_held_out_ones_with_their_scores():
    samples = open_samples("photographs", None, needs_scores=True, limit=3)
    held_out = photographs("held_out")
    assert samples.split == "validation"
    assert [scored.key for scored in samples.scored] == [photograph.key for photograph in held_out[:3]]
    assert all(1 <= scored.score <= 9 for scored in samples.scored)
    (_, image), *_ = samples.read(0, 1)
    assert image.size == load_image(held_out[0].path).size


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        ((), "x.npz", "rFID compares reconstructions with their own originals"),
        ((), "train", "this looks like a training split"),
        (("--ratios", "4"), "val", "needs 4"),
        (("--size", "40"), "val", "expected a multiple of 16, a ratio of ours"),
        (("--split", "dev"), "val", "--split dev: expected"),
    ],
)
def test_misleading_arguments_are_refused(inputs, tmp_path, arguments, data, message):
    ratios = () if "--ratios" in arguments else ("--ratios", "16")
    found = run(inputs, tmp_path / "o", *ratios, *arguments, "--no-ocr", "--no-faces", data=data)
    assert found.exit_code == 2
    assert message in " ".join(found.stderr.split())


def test_baselines_are_parsed():
    assert parse_baseline("sd=a/b@8,16") == ("sd", "a/b", ["8", "16"])
    assert parse_baseline("a/b=c") == ("", "a/b=c", [])
    assert parse_baseline("flextok:a") == ("", "flextok:a", [])
    with pytest.raises(UserError, match="expected"):
        parse_baseline("sd=")
