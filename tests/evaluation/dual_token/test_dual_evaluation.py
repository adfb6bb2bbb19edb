"""Evaluation of the dual-token tokenizer: methods, bits, figures, resume and refusals."""

import io
import json

import pytest
import torch
from diffusers import VQModel
from PIL import Image
from torch import nn

from cat_fast.data.images.io import tensor_to_image
from cat_fast.dual_token.rerender.rerender import RerenderSettings
from cat_fast.dual_token.resize import resize
from cat_fast.dual_token.tokenizer import DualTokenizer
from cat_fast.errors import UserError
from cat_fast.evaluation.dual_token.bit_budget import at_bits
from cat_fast.evaluation.dual_token.methods import Method, Sample, make_methods
from cat_fast.evaluation.dual_token.movq import MoVQ
from cat_fast.evaluation.dual_token.run import ROWS, DualRun, evaluated_images
from cat_fast.evaluation.dual_token.summary import summarize
from cat_fast.evaluation.dual_token.super_resolution import open_super_resolution
from cat_fast.evaluation.metrics import mean_colour_psnr, psnr
from tests.dual_token.conftest import tiny_guide

SIZE, GRIDS = 48, [(2, 2), (4, 4)]


class Distance(nn.Module):
    """Mean absolute difference, in place of a perceptual distance."""

    def forward(self, x, y):
        return (x - y).abs().mean((1, 2, 3))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "images"
    path.mkdir()
    torch.manual_seed(0)
    for name in ("a", "b", "c"):
        smooth = resize(torch.rand(1, 3, 5, 5) * 2 - 1, (60, 50))[0]
        tensor_to_image(smooth).save(path / f"{name}.png")
    return path


def make_run(folder, out, limit=None, **settings):
    tokenizer = DualTokenizer(tiny_guide(), max_side=8)
    methods = make_methods(tokenizer, GRIDS)
    images = evaluated_images(str(folder), limit)
    return DualRun(images, methods, tokenizer, GRIDS, SIZE, ("mae", Distance()), out, settings)


def test_figures_are_means_over_images(folder, tmp_path):
    run = make_run(folder, tmp_path / "out")
    run.run()
    result = summarize(run, "images")
    json.dumps(result)
    assert result["images"] == 3
    originals = torch.stack([run._read(image).image for image in run.images])
    found = result["methods"]["mean colour"]["psnr"]["value"]
    assert found == pytest.approx(mean_colour_psnr(originals).mean().item(), abs=0.05)  # 8-bit rounding
    guide = result["methods"]["guide 4"]
    assert (guide["tokens"], guide["bits"]) == (16, 64)
    expected = [
        psnr(
            resize(run.tokenizer.decode_guides([run.tokenizer.encode(x, 4)])[0][None], (SIZE, SIZE)), x[None]
        ).item()
        for x in originals
    ]
    assert guide["psnr"]["value"] == pytest.approx(sum(expected) / 3, abs=0.05)
    low, high = guide["psnr"]["interval"]
    assert low <= guide["psnr"]["value"] <= high
    down = [result["methods"][f"downscaled {size}"]["psnr"]["value"] for size in (2, 4)]
    assert down[0] < down[1]  # a larger guide could hold more
    assert result["differences"]["guide 2 - mean colour"]["psnr"]["value"] == pytest.approx(
        result["methods"]["guide 2"]["psnr"]["value"] - found, abs=1e-6
    )
    assert "mae" in guide
    codes = result["codebooks"]["guide 4"]
    assert codes["size"] == 16
    assert 0 < codes["used"] <= 1


def test_an_interrupted_evaluation_resumes(folder, tmp_path, monkeypatch):
    whole = make_run(folder, tmp_path / "whole")
    whole.run()
    parts = make_run(folder, tmp_path / "parts")
    monkeypatch.setattr(parts, "images", parts.images[:1])
    parts.run()
    with (tmp_path / "parts" / ROWS).open("a") as file:
        file.write('{"key": "b.png", "meth')  # killed while it wrote
    again = make_run(folder, tmp_path / "parts")
    assert list(again.rows) == ["a.png"]
    done = []
    again.run(done.append)
    assert sum(done) == 3

    expected, found = (summarize(run, "images")["methods"] for run in (whole, again))
    assert list(found) == list(expected)
    for name, figures in expected.items():
        assert found[name]["psnr"] == figures["psnr"], name
    with pytest.raises(UserError, match="made with other settings"):
        make_run(folder, tmp_path / "parts", strength=0.5)


def test_an_image_that_was_replaced_is_measured_again(folder, tmp_path):
    make_run(folder, tmp_path / "out").run()
    tensor_to_image(torch.zeros(3, 60, 50)).save(folder / "b.png")
    again = make_run(folder, tmp_path / "out")
    assert sorted(again.rows) == ["a.png", "c.png"]
    again.run()
    assert sorted(make_run(folder, tmp_path / "out").rows) == ["a.png", "b.png", "c.png"]
    assert again.rows["b.png"]["methods"]["mean colour"]["psnr"] > 40


@pytest.mark.parametrize("uses_caption", [True, False])
def test_an_image_is_measured_again_if_a_method_uses_its_caption_and_it_changed(
    folder, tmp_path, uses_caption
):
    index = tmp_path / "index.jsonl"
    method = Method("copy", None, None, lambda sample: sample.image, uses_caption=uses_caption)
    tokenizer = DualTokenizer(tiny_guide(), max_side=8)

    def make(caption):
        rows = [{"path": f"images/{key}.png", "key": key, "caption": caption} for key in "abc"]
        rows[0]["caption"] = rows[2]["caption"] = "a gradient"
        index.write_text("".join(json.dumps(row) + "\n" for row in rows))
        images = evaluated_images(str(index))
        return DualRun(images, [method], tokenizer, GRIDS, SIZE, ("mae", Distance()), tmp_path / "out", {})

    make("a sky").run()
    assert sorted(make("a sky").rows) == ["a", "b", "c"]
    assert sorted(make("a sea").rows) == (["a", "c"] if uses_caption else ["a", "b", "c"])
    rows = [json.loads(line) for line in (tmp_path / "out" / ROWS).read_text().splitlines()]
    for row in rows:
        del row["caption"]  # of an earlier version
    (tmp_path / "out" / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sorted(make("a sea").rows) == ["a", "b", "c"]


def test_only_true_text_uses_captions():
    tokenizer = DualTokenizer(tiny_guide(), max_side=8)
    methods = make_methods(tokenizer, GRIDS, RerenderSettings(), true_text=True)
    assert [method.name for method in methods if method.uses_caption] == ["true text 2", "true text 4"]


def test_unreadable_images_are_left_out(folder, tmp_path):
    (folder / "d.png").write_bytes(b"no image")
    run = make_run(folder, tmp_path / "out")
    run.run()
    result = summarize(run, "images")
    assert result["images"] == 3
    assert list(result["left_out"]) == ["d.png"]
    assert run.sheet(2).width > 100
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes())  # repaired: measured by the next run
    again = make_run(folder, tmp_path / "out")
    again.run()
    result = summarize(again, "images")
    assert (result["images"], result["left_out"]) == (4, {})


@pytest.mark.parametrize("image_format", ["jpeg", "webp"])
def test_files_stay_within_their_bits(image_format):
    torch.manual_seed(0)
    image = resize(torch.rand(1, 3, 6, 6) * 2 - 1, (64, 64))[0]
    assert at_bits(image, 100, image_format) is None  # a header alone is longer
    errors = []
    for bits in (8 * 900, 8 * 3000):
        back = at_bits(image, bits, image_format)
        assert back.shape == image.shape
        errors.append((back - image).square().mean().item())
    assert errors[1] <= errors[0]
    buffer = io.BytesIO()
    tensor_to_image(image).save(buffer, format=image_format, quality=1)
    with Image.open(buffer) as smallest:
        assert smallest.size == (64, 64)


def save_movq(folder, **changes):
    """Write a MoVQ with random weights: stride 4, 32 codes."""
    torch.manual_seed(0)
    settings = {
        "block_out_channels": (32, 32, 32), "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3, "layers_per_block": 1, "latent_channels": 4,
        "num_vq_embeddings": 32, "norm_num_groups": 8, "norm_type": "spatial", "vq_embed_dim": 4,
    }  # fmt: skip
    VQModel(**(settings | changes)).save_pretrained(folder)
    return folder


def test_movq_has_as_many_tokens_as_the_guide(folder, tmp_path):
    movq = MoVQ(save_movq(tmp_path / "movq"), "cpu")
    assert (movq.stride, movq.bits) == (4, 5)
    image = torch.rand(3, SIZE, SIZE) * 2 - 1
    back = movq.reconstruct(image, (2, 3))
    direct = movq.model(resize(image[None], (8, 12))).sample[0].clamp(-1, 1)
    torch.testing.assert_close(back, direct)
    latents = movq.model.encode(resize(image[None], (8, 12))).latents
    assert latents.shape[-2:] == (2, 3)  # one code per token
    tokenizer = DualTokenizer(tiny_guide(), max_side=8)
    methods = {method.name: method for method in make_methods(tokenizer, GRIDS, movq=movq)}
    assert (methods["movq 4"].tokens, methods["movq 4"].bits) == (16, 80)
    run = DualRun(
        evaluated_images(str(folder)), list(methods.values()), tokenizer, GRIDS, SIZE, ("mae", Distance()),
        tmp_path / "out", {},
    )  # fmt: skip
    run.run()
    result = summarize(run, "images")
    found = result["differences"]["guide 4 - movq 4"]["psnr"]["value"]
    psnrs = [result["methods"][f"{name} 4"]["psnr"]["value"] for name in ("guide", "movq")]
    assert found == pytest.approx(psnrs[0] - psnrs[1], abs=1e-6)


def test_a_folder_that_is_not_a_movq_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder; expected the folder of a diffusers VQ"):
        MoVQ(tmp_path / "nowhere", "cpu")
    with pytest.raises(UserError, match="expected a MoVQ, with norm_type spatial; its norm_type is group"):
        MoVQ(save_movq(tmp_path / "group", norm_type="group"), "cpu")
    tiny_guide().save_pretrained(tmp_path / "guide")
    with pytest.raises(UserError, match="expected a VQModel, got a GuideModel"):
        MoVQ(tmp_path / "guide", "cpu")
    damaged = save_movq(tmp_path / "damaged")
    weights = damaged / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="damaged: cannot be loaded"):
        MoVQ(damaged, "cpu")
    (damaged / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not the config of a model"):
        MoVQ(damaged, "cpu")


def test_a_super_resolution_network_enlarges_the_guide(folder, tmp_path):
    tokenizer = DualTokenizer(tiny_guide(), max_side=8)

    def nearest(images, size):
        return nn.functional.interpolate(images, size)

    methods = {method.name: method for method in make_methods(tokenizer, GRIDS, upscale=nearest)}
    image = torch.rand(3, SIZE, SIZE) * 2 - 1
    found = methods["super-resolution 4"].reconstruct(Sample(image))
    (guide,) = tokenizer.decode_guides([tokenizer.encode(image, 4)])
    torch.testing.assert_close(found, nearest(guide[None], (SIZE, SIZE))[0])


def test_impossible_inputs_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no such file; expected weights"):
        open_super_resolution(tmp_path / "x.pth", "cpu")
    (tmp_path / "x.pth").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"spandrel|not a known super-resolution"):
        open_super_resolution(tmp_path / "x.pth", "cpu")
    with pytest.raises(UserError, match="no such file or folder"):
        evaluated_images(str(tmp_path / "nothing"))
    assert [image.key for image in evaluated_images(str(folder), 2)] == ["a.png", "b.png"]
    assert len(evaluated_images("photographs")) > 3
