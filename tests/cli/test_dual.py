"""`cat-fast dual`: encode, decode and train, and their one-line errors."""

import json

import pytest
from PIL import Image

from cat_fast.dual_token.rerender.open import open_backend
from cat_fast.dual_token.tokenizer import DualTokenizer, Renderer
from tests.cli.conftest import assert_one_line_error, parse_json, tiny_tokenizer
from tests.dual_token.conftest import tiny_guide
from tests.dual_token.rerender.conftest import cat_pipelines  # noqa: F401 # a fixture
from tests.dual_token.semantic.test_model import tiny_semantic


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved dual-token tokenizer: stride 8, 2 px per token."""
    path = tmp_path_factory.mktemp("dual")
    DualTokenizer(tiny_guide(), max_side=16).save_pretrained(path)
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_round_trip(cat_fast, folder, photos, tmp_path):
    result = cat_fast("dual", "encode", photos, "-c", folder, "-o", tmp_path / "t.jsonl", "--grid", "4x6")
    assert result.exit_code == 0, result.output
    assert "3 images encoded" in result.stdout
    assert "24" in result.stdout
    assert "96" in result.stdout  # bits: 24 codes of 16
    found = rows(tmp_path / "t.jsonl")
    assert [row["key"] for row in found] == ["a", "b", "c"]
    assert found[0]["size"] == [64, 96]
    assert len(found[0]["guide"]) == 4
    assert len(found[0]["ids"]) == 24 + 5
    result = cat_fast("dual", "decode", tmp_path / "t.jsonl", "-c", folder, "-o", tmp_path / "out", "--json")
    assert [row["grid"] for row in parse_json(result)["images"]] == [[4, 6]] * 3
    tokenizer = DualTokenizer.from_pretrained(folder, "cpu")
    with Image.open(photos / "c.webp") as image, Image.open(tmp_path / "out" / "c.png") as guide:
        assert guide.size == (12, 8)
        assert guide.tobytes() == tokenizer.decode_guide(tokenizer.encode(image, (4, 6))).tobytes()


def test_a_line_of_a_language_model_decodes(cat_fast, folder, tmp_path):
    vocabulary = DualTokenizer.from_pretrained(folder, "cpu").vocabulary
    ids = [vocabulary.begin, vocabulary.guide, vocabulary.rows[0], vocabulary.columns[1]]
    ids += [vocabulary.guide_codes[3], vocabulary.guide_codes[0], vocabulary.end]
    (tmp_path / "lm.jsonl").write_text(json.dumps({"ids": ids}) + "\n\n")
    result = cat_fast("dual", "decode", tmp_path / "lm.jsonl", "-c", folder, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out" / "line1.png") as image:
        assert image.size == (4, 2)


def test_unreadable_and_small_images_are_skipped(cat_fast, folder, photos, tmp_path):
    (photos / "d.png").write_bytes(b"no image")
    Image.new("RGB", (4, 90)).save(photos / "e.png")
    result = cat_fast("dual", "encode", photos, "-c", folder, "-o", tmp_path / "t.jsonl", "--json")
    assert result.exit_code == 1
    errors = [row["error"] for row in parse_json(result)["images"]]
    assert errors[:3] == [None] * 3
    assert "d.png" in errors[3]
    assert "e.png: the image of 4 x 90 px is smaller than its guide" in errors[4]
    assert "2 of 5 images failed" in result.stderr
    assert len(rows(tmp_path / "t.jsonl")) == 3
    result = cat_fast("dual", "encode", photos / "d.png", "-c", folder, "-o", tmp_path / "none.jsonl")
    assert result.exit_code == 2
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row | {"guide": [[99] * 4] * 4, "ids": None}, "line 2: guide codes: expected 0 .. 15"),
        (lambda row: row | {"ids": row["ids"][:-3], "guide": None}, "line 2: the sequence is cut after"),
        (lambda row: row | {"guide": [[1, 2], [3]], "ids": None}, "rows of equal length"),
        (lambda row: row | {"semantic": [1] * 32, "ids": None}, "expected 0 per image, got 32"),
        (lambda row: row | {"guide": [[0] * 4] * 4}, "ids and codes differ"),
        (lambda row: row | {"ids": [1.5]}, "ids: expected a list of integers"),
        (lambda row: row | {"tokenizer": "0" * 16}, "encoded by tokenizer 0000000000000000"),
        (lambda row: row | {"key": "../a"}, "key: expected a file name"),
        (lambda row: row | {"key": "a"}, "occurs twice"),
        (lambda row: [], "expected an object, got list"),
        (lambda row: {}, "expected ids, or guide"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_decoded(cat_fast, folder, photos, tmp_path, change, words):
    file = tmp_path / "t.jsonl"
    cat_fast("dual", "encode", photos, "-c", folder, "-o", file, "--grid", "4")
    first, second, *rest = rows(file)
    file.write_text("".join(json.dumps(row) + "\n" for row in (first, change(second), *rest)))
    result = cat_fast("dual", "decode", file, "-c", folder, "-o", tmp_path / "out")
    assert_one_line_error(result, "t.jsonl", words)
    assert not (tmp_path / "out").exists()


def test_damaged_files_folders_and_options_are_refused(cat_fast, folder, photos, tmp_path):
    out = ("-o", tmp_path / "out")
    assert_one_line_error(
        cat_fast("dual", "decode", tmp_path / "x.jsonl", "-c", folder, *out), "no such file"
    )
    cat_fast("dual", "encode", photos, "-c", folder, "-o", tmp_path / "t.jsonl", "--grid", "4")
    sized = cat_fast("dual", "decode", tmp_path / "t.jsonl", "-c", folder, *out, "--size", "256")
    assert_one_line_error(sized, "--size 256: guides have 2 pixels per token and side")
    (tmp_path / "half.jsonl").write_text('{"ids": [1, 2')
    half = cat_fast("dual", "decode", tmp_path / "half.jsonl", "-c", folder, *out)
    assert_one_line_error(half, "line 1: not valid JSON")
    (tmp_path / "empty.jsonl").write_text("\n")
    empty = cat_fast("dual", "decode", tmp_path / "empty.jsonl", "-c", folder, *out)
    assert_one_line_error(empty, "contains no codes")
    tiny_tokenizer().save_pretrained(tmp_path / "vae")
    other = cat_fast("dual", "encode", photos, "-c", tmp_path / "vae", *out)
    assert_one_line_error(other, "expected the config.json of a GuideModel", "NestedAutoencoderKL")
    for grid, words in (("0", "tokens per side"), ("2x", "HEIGHTxWIDTH"), ("17", "at most 16")):
        result = cat_fast("dual", "encode", photos, "-c", folder, *out, "--grid", grid)
        assert_one_line_error(result, words)
    unknown = cat_fast("dual", "encode", tmp_path / "nothing.png", "-c", folder, *out)
    assert unknown.exit_code == 2


def test_descriptions_choose_the_number_of_tokens(cat_fast, folder, photos, tmp_path):
    (photos / "a.txt").write_text("a clear blue sky")
    (photos / "b.txt").write_text("a newspaper page full of columns of text, tables and photographs")
    out = tmp_path / "t.jsonl"
    result = cat_fast("dual", "encode", photos, "-c", folder, "-o", out, "--grid", "auto", "--json")
    assert result.exit_code == 1
    a, b, c = parse_json(result)["images"]
    assert a["tokens"] < b["tokens"]
    assert "c.webp: no description" in c["error"]
    every = ("--caption", "a clear blue sky", "--grid-thresholds", "0,0,0")
    result = cat_fast("dual", "encode", photos / "c.webp", "-c", folder, "-o", out, "--grid", "auto", *every)
    assert result.exit_code == 0, result.output
    assert len(rows(out)[0]["guide"]) == 16
    wrong = cat_fast("dual", "encode", photos, "-c", folder, "-o", out, "--caption", "a sky")
    assert_one_line_error(wrong, "for --grid auto only")
    limits = ("--grid", "auto", "--grid-thresholds", "3,2,1")
    assert_one_line_error(cat_fast("dual", "encode", photos, "-c", folder, "-o", out, *limits), "increasing")


def test_train_refuses_other_configurations(cat_fast):
    assert_one_line_error(cat_fast("dual", "train", "guides"), "expected a YAML file", "nano_guide")
    other = cat_fast("dual", "train", "configs/tokenizer/nano.yaml")
    assert_one_line_error(other, "got task tokenizer")
    wrong = cat_fast("dual", "train", "nano_guide", "grids=[0]")
    assert_one_line_error(wrong, "grids")


def test_train_starts_the_packaged_configuration(cat_fast, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        "cat_fast.training.launch.launch", lambda *args, **options: calls.append((args, options))
    )
    result = cat_fast("dual", "train", "nano_guide", f"output_dir={tmp_path}", "--ranks", "1")
    assert result.exit_code == 0, result.output
    (path, overrides), options = calls[0]
    assert path.name == "nano_guide.yaml"
    assert overrides == [f"output_dir={tmp_path}"]
    assert options["ranks"] == 1
    assert options["run_folder"] == tmp_path
    assert "model" in result.stdout


def test_combine_and_decode_with_a_diffusion_model(cat_fast, folder, photos, tmp_path, cat_pipelines):  # noqa: F811
    target = open_backend(str(cat_pipelines["flow"]), "cpu").text_target
    tiny_semantic(text_width=target.width, text_fingerprint=target.fingerprint()).save_pretrained(
        tmp_path / "semantic"
    )
    parts = ["--guide", folder / "guide", "--semantic", tmp_path / "semantic"]
    whole = tmp_path / "whole"
    result = cat_fast("dual", "combine", *parts, "--renderer", cat_pipelines["flow"], "-o", whole)
    assert result.exit_code == 0, result.output
    tokens = tmp_path / "t.jsonl"
    assert cat_fast("dual", "encode", photos, "-c", whole, "-o", tokens, "--grid", "4").exit_code == 0
    assert len(rows(tokens)[0]["semantic"]) == 4
    command = ["dual", "decode", tokens, "-c", whole, "--steps", "2"]
    assert cat_fast(*command, "-o", tmp_path / "a").exit_code == 0
    with Image.open(tmp_path / "a" / "a.png") as image:
        assert image.size == (64, 64)
    assert cat_fast(*command, "-o", tmp_path / "b", "--size", "64x128", "--mode", "semantic").exit_code == 0
    with Image.open(tmp_path / "b" / "a.png") as image:
        assert image.size == (128, 64)
    assert cat_fast(*command, "-o", tmp_path / "c", "--guides").exit_code == 0
    with Image.open(tmp_path / "c" / "a.png") as image:
        assert image.size == (8, 8)
    for options, words in (
        (["--size", "65"], "expected a multiple of"),
        (["--size", "x"], "--size x: expected pixels per side"),
        (["--mode", "x"], "mode: expected full"),
        (["--strength", "2"], "strength"),
        (["--equations", "paper"], "this model is a flow"),
        (["--renderer", "nowhere"], "nowhere"),
    ):
        result = cat_fast(*command, "-o", tmp_path / "d", *options)
        assert_one_line_error(result, words)
        assert not list((tmp_path / "d").glob("*.png"))
    wrong = cat_fast("dual", "combine", *parts[:2], "--ratio", "8", "-o", tmp_path / "e")
    assert_one_line_error(wrong, "--ratio")


def test_eval_prints_and_resumes(cat_fast, folder, photos, tmp_path):
    command = ["dual", "eval", "--data", photos, "-c", folder, "-o", tmp_path / "e", "--grids", "2,4"]
    command += ["--size", "48", "--sheet", "2"]
    result = cat_fast(*command)
    assert result.exit_code == 0, result.output
    assert "guide 4" in result.stdout
    assert "of 16 codes used" in result.stdout
    assert (tmp_path / "e" / "sheet.png").is_file()
    again = parse_json(cat_fast(*command, "--json"))
    assert again == json.loads((tmp_path / "e" / "dual.json").read_text())
    assert again["images"] == 3
    assert_one_line_error(cat_fast(*command, "--limit", "1"), "made with other settings")
    large = cat_fast(*command[:-6], "--grids", "16", "--size", "16", "-o", tmp_path / "f")
    assert_one_line_error(large, "larger than images of 16 px")


def test_eval_with_the_text_of_captions(cat_fast, folder, photos, tmp_path, cat_pipelines):  # noqa: F811
    target = open_backend(str(cat_pipelines["flow"]), "cpu").text_target
    semantic = tiny_semantic(text_width=target.width, text_fingerprint=target.fingerprint())
    renderer = Renderer(model=str(cat_pipelines["flow"]))
    DualTokenizer(tiny_guide(), semantic, renderer, max_side=16).save_pretrained(tmp_path / "whole")
    lines = [{"key": "a", "path": str(photos / "b.png"), "caption": "a red house"}]
    index = tmp_path / "index.jsonl"
    index.write_text(json.dumps(lines[0]))
    command = ["dual", "eval", "--data", index, "-c", tmp_path / "whole", "--grids", "4", "--size", "64"]
    command += ["--steps", "2", "--true-text", "--sheet", "1"]
    result = parse_json(cat_fast(*command, "--json", "-o", tmp_path / "e"))
    methods, differences = result["methods"], result["differences"]
    assert methods["true text 4"]["tokens"] is None
    name = "perceptual" if "perceptual" in methods["semantic"] else list(methods["semantic"])[5]
    expected = methods["true text 4"][name]["value"] - methods["unconditioned 4"][name]["value"]
    assert differences["true text 4 - unconditioned 4"][name]["value"] == pytest.approx(expected, abs=1e-4)
    # the states of a caption, not those of the codes
    assert methods["true text 4"]["psnr"] != methods["re-rendered 4"]["psnr"]
    without = cat_fast(*command, "--no-render", "-o", tmp_path / "f")
    assert_one_line_error(without, "--true-text: needs re-rendering")
    index.write_text(json.dumps(lines[0] | {"caption": ""}))
    assert_one_line_error(cat_fast(*command, "-o", tmp_path / "f"), "a has no caption")
