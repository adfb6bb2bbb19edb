"""Every command takes what the tokenizer's class takes: our folders, diffusers' and LDM checkpoints."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from cat_fast.data.images.io import image_to_tensor, load_image, resize_center_crop
from cat_fast.inference import CATPipeline
from cat_fast.models.load import load_tokenizer
from tests.cli.conftest import assert_one_line_error, parse_json
from tests.cli.test_pipeline import NAMES, export
from tests.tokenizer.test_pretrained import LDM

KINDS = ["diffusers folder", "ckpt", "safetensors", "pt"]


def save(kind, folder):
    """Save an autoencoder of ratio 8 and return its folder or file."""
    if kind == "diffusers folder":
        torch.manual_seed(0)
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (8, 8, 8, 8),
            "norm_num_groups": 4,
        }
        AutoencoderKL(**blocks, latent_channels=4).save_pretrained(folder / "vae")
        return folder / "vae"
    state = LDM((1, 1, 1, 1), (), layers=1).state
    path = folder / f"vae.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(
            {"state_dict": {f"first_stage_model.{name}": value for name, value in state.items()}}, path
        )
    return path


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory):
    return save(request.param, tmp_path_factory.mktemp("source"))


@torch.no_grad()
def test_encode_and_decode(cat_fast, source, photos, tmp_path):
    out = tmp_path / "out.safetensors"
    result = cat_fast("encode", photos, "-c", source, "-o", out, "--ratio", 8, "--size", 64)
    assert result.exit_code == 0, result.output
    assert "float32" not in result.stderr
    image = image_to_tensor(resize_center_crop(load_image(photos / "a.jpg"), 64))
    expected = load_tokenizer(source, "cpu").encode(image[None], 8).latent_dist.mode()[0]
    torch.testing.assert_close(load_file(out)["a"], expected, rtol=1e-4, atol=1e-5)
    result = cat_fast("decode", out, "-c", source, "-o", tmp_path / "images")
    assert result.exit_code == 0, result.output
    assert load_image(tmp_path / "images" / "a.png").size == (64, 64)


def test_encode_shards(cat_fast, source, photos, tmp_path):
    command = ["encode-shards", photos, "-c", source, "-o", tmp_path / "latents", "--ratio", 8, "--size", 64]
    summary = parse_json(cat_fast(*command, "--json"))
    assert summary["ratios"] == {"8": 3}
    assert summary["tokenizer"] == load_tokenizer(source, "cpu").fingerprint()


def test_pipeline(cat_fast, source, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    fingerprint = load_tokenizer(source, "cpu").fingerprint()
    generator = export(tmp_path / "generator", ratios=(8,), tokenizer_fingerprint=fingerprint)
    command = ["pipeline", "--tokenizer", source, "--generator", generator, "--out", tmp_path / "pipeline"]
    result = cat_fast(*command, "--labels", tmp_path / "names.txt", "--resolution", 64)
    assert result.exit_code == 0, result.output
    assert CATPipeline.from_pretrained(tmp_path / "pipeline").vae.fingerprint() == fingerprint


def test_a_model_in_the_cache_of_the_hub(monkeypatch, tmp_path):
    """By its name, without access to the network."""
    folder = save("diffusers folder", tmp_path)
    found = {("owner/vae", "config.json"): str(folder / "config.json")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: found.get(names))
    assert load_tokenizer(Path("owner/vae"), "cpu").ratios == (8,)


@pytest.mark.parametrize("command", ["encode", "decode", "encode-shards"])
def test_other_files_are_refused_in_one_line(cat_fast, photos, tmp_path, command):
    latents = tmp_path / "latents.safetensors"
    source = save("ckpt", tmp_path)
    assert cat_fast("encode", photos, "-c", source, "-o", latents, "--ratio", 8, "--size", 64).exit_code == 0
    (tmp_path / "notes.txt").write_text("a tokenizer")
    (tmp_path / "notes.ckpt").write_text("a tokenizer")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    given = latents if command == "decode" else photos
    for name, message in (
        ("notes.txt", "notes.txt: is another kind of file; expected the folder of a trained tokenizer"),
        ("notes.ckpt", "notes.ckpt: not a PyTorch checkpoint"),
        ("other.pt", "other.pt: no KL autoencoder in LDM's layout found"),
        ("nothing.ckpt", "nothing.ckpt: no such folder or file"),
        ("photos", "photos: config.json is missing"),
    ):
        result = cat_fast(command, given, "-c", tmp_path / name, "-o", tmp_path / "out")
        assert_one_line_error(result, message)
