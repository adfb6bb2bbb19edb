"""`cat-fast encode` and `cat-fast decode` end to end: files, output and exit codes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from cat_fast.complexity import Description, choose_ratio, default_scorer, default_thresholds
from cat_fast.complexity.image_scorers.student.scorer import image_student
from cat_fast.data.images.io import image_to_tensor, load_image, resize_center_crop, tensor_to_image
from cat_fast.tokenizer import NestedAutoencoderKL
from tests.cli.conftest import assert_one_line_error, parse_json, tiny_tokenizer

SIMPLE, BUSY = (
    "a plane in the sky",
    "a newspaper page full of text, charts, tables and small photographs of people",
)

RECORD = "execution.json"


@pytest.fixture
def latents(cat_fast, checkpoint, photos, tmp_path):
    """The three photographs encoded at 16x."""
    path = tmp_path / "latents.safetensors"
    result = cat_fast("encode", photos, "-c", checkpoint, "-o", path, "--ratio", 16, "--size", 64)
    assert result.exit_code == 0, result.output
    return path


class TestEncode:
    @pytest.mark.parametrize("ratio", [8, 16, 32])
    def test_latents_equal_those_of_the_tokenizer(self, cat_fast, checkpoint, photos, tmp_path, ratio):
        out = tmp_path / "new folder" / "latents.safetensors"
        result = cat_fast("encode", photos, "-c", checkpoint, "-o", out, "--ratio", ratio, "--size", 64)
        assert result.exit_code == 0, result.output

        written = load_file(out)
        assert sorted(written) == ["a", "b", "c"]
        tokenizer = NestedAutoencoderKL.from_pretrained(checkpoint)
        for key, name in (("a", "a.jpg"), ("b", "b.png"), ("c", "c.webp")):
            x = image_to_tensor(resize_center_crop(load_image(photos / name), 64))
            with torch.no_grad():
                expected = tokenizer.encode(x[None], ratio).latent_dist.mode()[0]
            assert written[key].shape == (4, 64 // ratio, 64 // ratio)
            torch.testing.assert_close(written[key], expected, rtol=1e-4, atol=1e-5)

    def test_header_has_the_metadata_of_each_latent(self, latents, checkpoint):
        with safe_open(latents, framework="pt") as file:
            header = json.loads(file.metadata()["cat_fast.latents"])
        assert header["tokenizer"] == NestedAutoencoderKL.from_pretrained(checkpoint).fingerprint()
        assert header["images"]["b"] == {
            "ratio": 16,
            "size": 64,
            "source": "b.png",
            "score": None,
            "why": "fixed 16x",
            "scored_by": None,
            "thresholds": None,
            "jpeg_thresholds": None,
        }

    def test_origin_of_the_ratio_is_stored_with_each_latent(self, cat_fast, checkpoint, photos, tmp_path):
        out = tmp_path / "out.safetensors"
        (photos / "a.txt").write_text(SIMPLE)
        options = ["--size", 64, "--thresholds", "0,9", "--jpeg-thresholds", "0,1000000", "--json"]
        result = cat_fast("encode", photos, "-c", checkpoint, "-o", out, *options)
        with safe_open(out, framework="pt") as file:
            images = json.loads(file.metadata()["cat_fast.latents"])["images"]
        scorer, own = default_scorer(), default_thresholds()
        stored = {"scorer": scorer.name, "version": scorer.version, "thresholds": [own.a, own.b]}
        names = ("ratio", "scored_by", "thresholds", "jpeg_thresholds")
        assert [images["a"][name] for name in names] == [16, stored, [0, 9], None]
        assert [images["b"][name] for name in names] == [16, None, None, [0, 1000000]]
        assert result.stderr.count("ratios: thresholds 0,9 instead of") == 1
        assert "mean 4.0 tokens per image at 64 px" in result.stderr

    @pytest.mark.parametrize(("caption", "flags"), [(SIMPLE, []), (BUSY, ["--has-text"])])
    def test_one_caption_sets_the_ratio_of_all_images(
        self, cat_fast, checkpoint, photos, tmp_path, caption, flags
    ):
        out = tmp_path / "out.safetensors"
        command = [
            "encode",
            photos,
            "-c",
            checkpoint,
            "-o",
            out,
            "--size",
            64,
            "--caption",
            caption,
            "--json",
        ]
        images = parse_json(cat_fast(*command, *flags))["images"]
        chosen = choose_ratio(Description(caption, has_text=bool(flags)))
        assert {(image["ratio"], image["score"]) for image in images} == {(chosen.ratio, chosen.score)}
        assert {latent.shape[-1] for latent in load_file(out).values()} == {64 // chosen.ratio}

    def test_simple_and_busy_captions_get_different_ratios(self):
        simple, busy = choose_ratio(Description(SIMPLE)), choose_ratio(Description(BUSY, has_text=True))
        assert (simple.ratio, busy.ratio) == (32, 8)

    def test_captions_file_text_file_and_missing_caption(self, cat_fast, checkpoint, photos, tmp_path):
        rows = [{"file": "a.jpg", "caption": BUSY, "has_text": True}]
        (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (photos / "b.txt").write_text(SIMPLE + "\n")
        command = ["encode", photos, "-c", checkpoint, "-o", tmp_path / "out.safetensors", "--size", 64]
        command += ["--captions", tmp_path / "captions.jsonl"]

        a, b, c = parse_json(cat_fast(*command, "--json"))["images"]
        assert (a["ratio"], a["tokens"], a["source"]) == (8, 16, "caption")
        assert (b["ratio"], b["tokens"], b["source"]) == (32, 1, "caption")
        # c is a smooth blur.
        student = image_student()
        (by_pixels,) = student.score_images([student.prepare(load_image(photos / "c.webp"))])
        assert (c["ratio"], c["score"], c["source"]) == (32, by_pixels.score.score, "pixels")
        assert c["scored_by"]["scorer"] == "image_student"

        output = cat_fast(*command).stdout
        assert "1 without a caption: ratio from the pixels" in output
        assert "3 images: 1 at 8x, 2 at 32x; mean 6.0 tokens against 4 at a fixed 16x (+50.0%)" in output
        assert "out.safetensors" in output
        (c,) = parse_json(cat_fast(*command, "--json", "--jpeg-thresholds", "1,2"))["images"][2:]
        assert (c["ratio"], c["score"], c["source"]) == (8, None, "jpeg size")

    def test_caption_rows_without_an_image_are_reported(self, cat_fast, checkpoint, photos, tmp_path):
        rows = [{"file": f"photos/{name}.jpg", "caption": SIMPLE} for name in ("a", "typo")]
        rows += [{"key": f"other-{n}", "caption": SIMPLE} for n in range(11)]
        (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        command = ["encode", photos, "-c", checkpoint, "-o", tmp_path / "out.safetensors", "--size", 64]
        command += ["--captions", tmp_path / "captions.jsonl"]
        for options in ([], ["--ratio", 16]):  # a fixed ratio does not use the captions
            result = cat_fast(*command, *options)
            assert result.exit_code == 0
            assert "captions.jsonl: 12 of its rows match no image: photos/typo.jpg, other-0," in result.stderr
            assert result.stderr.endswith("other-8, ...\n")
        assert len(parse_json(cat_fast(*command, "--json"))["unmatched_captions"]) == 12

    def test_a_file_given_by_several_paths_is_encoded_once(
        self, cat_fast, checkpoint, photos, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link.png").symlink_to(photos / "b.png")
        given = ["photos/a.jpg", "photos", photos / "a.jpg", "photos/../photos/c.webp", "link.png", photos]
        command = ["encode", *given, "-c", checkpoint, "-o", "out.safetensors", "--ratio", 32, "--size", 64]
        images = parse_json(cat_fast(*command, "--json"))["images"]
        assert [image["file"] for image in images] == ["photos/a.jpg", "photos/b.png", "photos/c.webp"]
        assert sorted(load_file("out.safetensors")) == ["a", "b", "c"]

    def test_images_with_the_same_name_are_all_kept(self, cat_fast, checkpoint, photos, tmp_path):
        (photos / "more").mkdir()
        Image.new("RGB", (64, 64), "red").save(photos / "more" / "a.png")
        out = tmp_path / "out.safetensors"
        result = cat_fast("encode", photos, "-c", checkpoint, "-o", out, "--ratio", 32, "--size", 64)
        assert result.exit_code == 0, result.output
        assert sorted(load_file(out)) == ["a", "a-2", "b", "c"]

    def test_batch_size_does_not_change_latents(self, cat_fast, checkpoint, photos, latents, tmp_path):
        out = tmp_path / "single.safetensors"
        command = ["encode", photos, "-c", checkpoint, "-o", out, "--ratio", 16, "--size", 64]
        assert cat_fast(*command, "--batch-size", 1).exit_code == 0
        together, single = load_file(latents), load_file(out)
        assert sorted(together) == sorted(single) == ["a", "b", "c"]
        for key in together:
            torch.testing.assert_close(together[key], single[key], rtol=1e-4, atol=1e-5)


class TestBadImages:
    @pytest.mark.parametrize(("ratios", "code"), [((8,), 1), ((8, 16, 32), 2)])
    def test_latents_that_are_not_finite_are_not_written(
        self, cat_fast, photos, tmp_path, monkeypatch, ratios, code
    ):
        encode = NestedAutoencoderKL.encode

        def overflowing(self, x, ratio):
            encoded = encode(self, x, ratio)
            encoded.latent_dist.mean.mul_(float("inf") if ratio in ratios else 1)
            return encoded

        monkeypatch.setattr(NestedAutoencoderKL, "encode", overflowing)
        tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
        (photos / "a.txt").write_text(BUSY + " with numbers")  # 8x; the others 32x
        out = tmp_path / "out.safetensors"
        command = ["encode", photos, "-c", tmp_path / "tokenizer", "-o", out, "--size", 64, "--has-text"]
        result = cat_fast(*command)
        assert result.exit_code == code
        assert "a.jpg: the latent contains NaN or infinite values; check the weights" in result.stderr
        assert out.exists() == (code == 1)
        if code == 1:
            assert sorted(load_file(out)) == ["b", "c"]

    def test_bad_images_do_not_affect_the_others(self, cat_fast, checkpoint, photos, tmp_path):
        (photos / "broken.jpg").write_bytes((photos / "a.jpg").read_bytes()[:300])
        (photos / "empty.png").touch()
        out = tmp_path / "out.safetensors"
        command = ["encode", photos, tmp_path / "missing.jpg", "-c", checkpoint, "-o", out]
        result = cat_fast(*command, "--ratio", 16, "--size", 64)
        assert result.exit_code == 1
        assert sorted(load_file(out)) == ["a", "b", "c"]
        *errors, last = result.stderr.splitlines()
        assert [line.startswith("error: ") for line in errors] == [True] * 3
        for name, line in zip(("broken.jpg", "empty.png", "missing.jpg"), errors, strict=True):
            assert name in line
        assert last == "3 of 6 images failed; the others were written"

    def test_json_includes_failures(self, cat_fast, checkpoint, photos, tmp_path):
        (photos / "empty.png").touch()
        command = ["encode", photos, "-c", checkpoint, "-o", tmp_path / "o.safetensors", "--ratio", 16]
        images = parse_json(cat_fast(*command, "--size", 64, "--json"))["images"]
        assert [bool(image["error"]) for image in images] == [False, False, False, True]

    def test_unreadable_caption_file_affects_only_its_image(self, cat_fast, checkpoint, photos, tmp_path):
        (photos / "a.txt").write_bytes(b"caf\xe9")
        command = ["encode", photos, "-c", checkpoint, "-o", tmp_path / "o.safetensors", "--size", 64]
        result = cat_fast(*command)
        assert result.exit_code == 1
        assert "a.txt" in result.stderr
        assert sorted(load_file(tmp_path / "o.safetensors")) == ["b", "c"]

    def test_nothing_is_written_if_all_images_are_bad(self, cat_fast, checkpoint, tmp_path):
        (tmp_path / "a.jpg").touch()
        out = tmp_path / "out.safetensors"
        out.write_bytes(b"earlier work")
        assert_one_line_error(cat_fast("encode", tmp_path / "a.jpg", "-c", checkpoint, "-o", out), "empty")
        assert out.read_bytes() == b"earlier work"

    def test_interruption_leaves_existing_files(self, cat_fast, checkpoint, photos, tmp_path, monkeypatch):
        out = tmp_path / "out" / "latents.safetensors"
        out.parent.mkdir()
        out.write_bytes(b"earlier work")

        def interrupted(path):
            if path.name == "b.png":
                raise KeyboardInterrupt
            return load_image(path)

        monkeypatch.setattr("cat_fast.inference.encoding.codec.load_image", interrupted)
        result = cat_fast("encode", photos, "-c", checkpoint, "-o", out, "--size", 64, "--batch-size", 1)
        assert result.exit_code == 130
        assert len(result.stderr.splitlines()) == 1
        assert [path.name for path in out.parent.iterdir()] == ["latents.safetensors"]
        assert out.read_bytes() == b"earlier work"


class TestErrors:
    def test_unknown_ratio(self, cat_fast, checkpoint, photos):
        for ratio in ("12", "0", "-8", "8x", ""):
            result = cat_fast("encode", photos, "-c", checkpoint, f"--ratio={ratio}")
            assert_one_line_error(result, "8, 16, 32 or auto")

    def test_ratio_that_the_tokenizer_lacks(self, cat_fast, photos, tmp_path):
        tiny_tokenizer(ratios=(16,)).save_pretrained(tmp_path / "fixed")
        command = ["encode", photos, "-c", tmp_path / "fixed", "-o", tmp_path / "o.safetensors"]
        assert_one_line_error(cat_fast(*command, "--ratio", 8), "no ratio 8", "16")
        assert_one_line_error(cat_fast(*command), "adaptive ratios need")
        assert cat_fast(*command, "--ratio", 16, "--size", 64).exit_code == 0

    def test_size_that_does_not_divide(self, cat_fast, checkpoint, photos, tmp_path):
        command = ["encode", photos, "-c", checkpoint, "-o", tmp_path / "o.safetensors"]
        for size in (100, 0, -64):
            assert_one_line_error(cat_fast(*command, f"--size={size}"), "multiple of 64")

    def test_missing_checkpoint(self, cat_fast, photos, tmp_path):
        assert_one_line_error(cat_fast("encode", photos, "-c", tmp_path / "no"), "no such folder")

    def test_folder_without_checkpoint_suggests_a_subfolder(self, cat_fast, checkpoint, photos):
        result = cat_fast("encode", photos, "-c", checkpoint.parent)
        assert_one_line_error(result, "config.json is missing", f"did you mean {checkpoint.parent}")

    def test_checkpoint_of_another_model(self, cat_fast, photos, tmp_path):
        (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
        assert_one_line_error(cat_fast("encode", photos, "-c", tmp_path), "NestedAutoencoderKL")

    def test_damaged_weights(self, cat_fast, checkpoint, photos, tmp_path):
        damaged = tmp_path / "damaged"
        damaged.mkdir()
        for file in checkpoint.iterdir():
            (damaged / file.name).write_bytes(file.read_bytes()[: None if file.suffix == ".json" else 5000])
        assert_one_line_error(cat_fast("encode", photos, "-c", damaged), "cannot be loaded")

    def test_missing_weights(self, cat_fast, checkpoint, photos, tmp_path):
        (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
        assert_one_line_error(cat_fast("encode", photos, "-c", tmp_path), "cannot be loaded")

    def test_empty_folder(self, cat_fast, checkpoint, tmp_path):
        (tmp_path / "empty").mkdir()
        assert_one_line_error(cat_fast("encode", tmp_path / "empty", "-c", checkpoint), "contains no image")

    def test_output_that_cannot_be_written(self, cat_fast, checkpoint, photos, tmp_path):
        (tmp_path / "file").touch()
        out = tmp_path / "file" / "latents.safetensors"
        assert_one_line_error(cat_fast("encode", photos, "-c", checkpoint, "-o", out), "cannot be written")
        assert_one_line_error(cat_fast("encode", photos, "-c", checkpoint, "-o", tmp_path), "is a folder")

    @pytest.mark.parametrize("line", ['{"caption": "a dog"}', '{"file": "a.jpg"}', "not json", ""])
    def test_malformed_captions_file(self, cat_fast, checkpoint, photos, tmp_path, line):
        (tmp_path / "captions.jsonl").write_text(line + "\n")
        result = cat_fast("encode", photos, "-c", checkpoint, "--captions", tmp_path / "captions.jsonl")
        assert_one_line_error(result, "captions.jsonl")

    def test_blank_caption(self, cat_fast, checkpoint, photos):
        assert_one_line_error(cat_fast("encode", photos, "-c", checkpoint, "--caption", " "), "caption")

    def test_unusable_device(self, cat_fast, checkpoint, photos):
        assert_one_line_error(cat_fast("encode", photos, "-c", checkpoint, "--device", "toaster"), "toaster")

    def test_bf16_is_recorded_and_close_to_fp32(self, cat_fast, checkpoint, latents, photos, tmp_path):
        half = tmp_path / "half.safetensors"
        options = ["--ratio", 16, "--size", 64, "--dtype", "bf16"]
        assert cat_fast("encode", photos, "-c", checkpoint, "-o", half, *options).exit_code == 0
        headers = []
        for path in (latents, half):
            with safe_open(path, framework="pt") as file:
                headers.append(json.loads(file.metadata()["cat_fast.latents"]))
        assert [header["made_with"]["dtype"] for header in headers] == ["float32", "bfloat16"]
        assert headers[0]["tokenizer"] == headers[1]["tokenizer"]
        exact, ours = load_file(latents), load_file(half)
        for key, latent in exact.items():
            error = (ours[key] - latent).square().mean().sqrt()
            assert 0 < error < 0.03 * latent.square().mean().sqrt()
        out = tmp_path / "out"
        assert cat_fast("decode", half, "-c", checkpoint, "-o", out, "--dtype", "bf16").exit_code == 0
        assert json.loads((out / RECORD).read_text())["dtype"] == "bfloat16"


class TestDecode:
    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
    def test_images_equal_those_of_the_tokenizer(self, cat_fast, checkpoint, latents, tmp_path, suffix):
        out = tmp_path / "new" / "images"
        result = cat_fast("decode", latents, "-c", checkpoint, "-o", out, "--format", suffix)
        assert result.exit_code == 0, result.output
        assert sorted(path.name for path in out.iterdir()) == [*(f"{key}.{suffix}" for key in "abc"), RECORD]

        tokenizer = NestedAutoencoderKL.from_pretrained(checkpoint)
        for key, latent in load_file(latents).items():
            with torch.no_grad():
                expected = tensor_to_image(tokenizer.decode(latent[None], 16).sample[0])
            expected.save(tmp_path / f"expected.{suffix}", quality=95)
            actual = np.asarray(load_image(out / f"{key}.{suffix}")).astype(int)
            expected = np.asarray(load_image(tmp_path / f"expected.{suffix}"))
            assert actual.shape == (64, 64, 3)
            assert np.abs(actual - expected).mean() < (
                0.1 if suffix == "png" else 0.5
            )  # levels; lossy files amplify

    def test_mixed_ratios_decode_to_one_size(self, cat_fast, checkpoint, photos, tmp_path):
        for name, caption in (("a", SIMPLE), ("b", BUSY)):
            (photos / f"{name}.txt").write_text(caption)
        path, out = tmp_path / "l.safetensors", tmp_path / "out"
        assert cat_fast("encode", photos, "-c", checkpoint, "-o", path, "--size", 64).exit_code == 0
        images = parse_json(cat_fast("decode", path, "-c", checkpoint, "-o", out, "--json"))["images"]
        assert len({image["ratio"] for image in images}) > 1
        assert {Image.open(image["file"]).size for image in images} == {(64, 64)}

    def test_latents_of_another_tokenizer_are_rejected_unless_forced(self, cat_fast, latents, tmp_path):
        tiny_tokenizer(seed=1).save_pretrained(tmp_path / "other")
        command = ["decode", latents, "-c", tmp_path / "other", "-o", tmp_path / "out"]
        assert_one_line_error(cat_fast(*command), "encoded by tokenizer", "--force")
        assert not (tmp_path / "out").exists()
        assert cat_fast(*command, "--force").exit_code == 0
        assert len(list((tmp_path / "out").glob("*.png"))) == 3

    def test_latents_with_other_channels_fail_even_if_forced(self, cat_fast, latents, tmp_path):
        tiny_tokenizer(latent_channels=8).save_pretrained(tmp_path / "other")
        result = cat_fast("decode", latents, "-c", tmp_path / "other", "-o", tmp_path / "out", "--force")
        assert result.exit_code == 2
        assert "expected a latent of shape (8, 4, 4)" in result.stderr

    def test_bad_latent_does_not_affect_the_others(self, cat_fast, checkpoint, latents, tmp_path):
        rewrite(latents, tensors={"b": torch.full((4, 4, 4), torch.nan)})
        result = cat_fast("decode", latents, "-c", checkpoint, "-o", tmp_path / "out")
        assert result.exit_code == 1
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png", RECORD]
        assert "error: b: the image contains NaN" in result.stderr

    def test_name_cannot_escape_the_output_folder(self, cat_fast, checkpoint, latents, tmp_path):
        rewrite(latents, names={"b": "../../escaped"})
        result = cat_fast("decode", latents, "-c", checkpoint, "-o", tmp_path / "deep" / "er" / "out")
        assert result.exit_code == 1
        assert "../../escaped" in result.stderr
        assert not list(tmp_path.rglob("escaped*"))

    @pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
    def test_damaged_file(self, cat_fast, checkpoint, tmp_path, content):
        (tmp_path / "l.safetensors").write_bytes(content)
        result = cat_fast("decode", tmp_path / "l.safetensors", "-c", checkpoint, "-o", tmp_path / "out")
        assert_one_line_error(result, "l.safetensors")

    def test_safetensors_of_something_else(self, cat_fast, checkpoint, tmp_path):
        weights = next(checkpoint.glob("*.safetensors"))
        result = cat_fast("decode", weights, "-c", checkpoint, "-o", tmp_path / "out")
        assert_one_line_error(result, "not a latent file")

    def test_missing_file_unknown_format_and_unwritable_folder(self, cat_fast, checkpoint, latents, tmp_path):
        options = ["-c", checkpoint, "-o", tmp_path / "out"]
        assert_one_line_error(cat_fast("decode", tmp_path / "no.safetensors", *options), "no such file")
        assert_one_line_error(cat_fast("decode", latents, *options, "--format", "bmp"), "png, jpg, webp")
        (tmp_path / "file").touch()
        result = cat_fast("decode", latents, "-c", checkpoint, "-o", tmp_path / "file")
        assert_one_line_error(result, "cannot be written")


def rewrite(path, *, tensors=None, names=None):
    """Change tensors or names in a latent file, as another program might."""
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["cat_fast.latents"])
    content = load_file(path) | (tensors or {})
    for old, new in (names or {}).items():
        content[new] = content.pop(old)
        header["images"][new] = header["images"].pop(old)
    save_file(content, path, metadata={"cat_fast.latents": json.dumps(header)})
