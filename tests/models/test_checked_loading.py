"""`from_pretrained` refuses folders of other classes, incomplete weights and unknown options, in one line."""

import inspect
import json
import logging
import re

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiTTransformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file, save_file

from cat_fast.errors import UserError
from cat_fast.generator import DiT
from cat_fast.models.load import load_model, load_tokenizer
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.weights.checked_model import LOADING_OPTIONS

WEIGHTS = "diffusion_pytorch_model.safetensors"


def small_vae():
    return NestedAutoencoderKL(
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_num_layers=1,
        ratios=(2, 4),
    )


def diffusers_vae(**changes):
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
    }
    return AutoencoderKL(**blocks | changes)


MODELS = {
    "DiT": lambda: DiT(hidden_size=16, depth=1, num_heads=2, num_classes=2),
    "NestedAutoencoderKL": small_vae,
    "AutoencoderKL": diffusers_vae,
    "AutoencoderTiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        upsampling_scaling_factor=2,
    ),
    "DiTTransformer2DModel": lambda: DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, num_embeds_ada_norm=10
    ),
}
KINDS = {"DiT": DiT, "NestedAutoencoderKL": NestedAutoencoderKL, "AutoencoderKL": NestedAutoencoderKL}
"""Class that loads the folder of each model."""


def refused(load, *messages):
    with pytest.raises(UserError, match=".*".join(messages)) as caught:
        load()
    assert "\n" not in str(caught.value)


@pytest.fixture(params=KINDS)
def name(request):
    return request.param


@pytest.fixture
def folder(name, tmp_path):
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        (DiT, "DiTTransformer2DModel"),
        (DiT, "NestedAutoencoderKL"),
        (DiT, "AutoencoderKL"),
        (NestedAutoencoderKL, "DiT"),
        (NestedAutoencoderKL, "AutoencoderTiny"),
        (NestedAutoencoderKL, "DiTTransformer2DModel"),
    ],
)
def test_the_folder_of_another_class_is_refused(tmp_path, kind, other):
    """diffusers takes the entries that both configs have and leaves the weights random."""
    MODELS[other]().save_pretrained(tmp_path)
    message = f"{tmp_path}: expected the config.json of a {kind.__name__}.*, got that of {other}"
    for options in ({}, {"output_loading_info": True}, {"low_cpu_mem_usage": False}):
        refused(lambda options=options: kind.from_pretrained(tmp_path, **options), message)
    refused(lambda: load_model(kind, "model", tmp_path, "cpu"), message)


@pytest.mark.parametrize("config", ["{}", "[1]", '{"architectures": ["ViT"]}', '{"_class_name": 3}'])
def test_a_config_without_a_class_is_refused(folder, name, config):
    (folder / "config.json").write_text(config)
    refused(lambda: KINDS[name].from_pretrained(folder), r"expected the config\.json of a")


def test_a_subclass_loads_the_folder_of_its_base(tmp_path):
    class Other(DiT):
        pass

    MODELS["DiT"]().save_pretrained(tmp_path)
    assert isinstance(Other.from_pretrained(tmp_path), Other)
    Other(hidden_size=16, depth=1, num_heads=2).save_pretrained(tmp_path / "other")
    assert isinstance(Other.from_pretrained(tmp_path / "other"), Other)
    refused(lambda: DiT.from_pretrained(tmp_path / "other"), "got that of Other")


def change_weights(folder, drop=(), add=()):
    state = load_file(folder / WEIGHTS)
    for key in drop:
        del state[key]
    state |= {key: torch.zeros(2) for key in add}
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    return state


@pytest.mark.parametrize("format_", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("drop", r"\S+ is missing from its weights, and 1 more"),
        ("add", "contain extra.bias and 1 more, which"),
    ],
)
def test_missing_and_extra_weights_are_refused(folder, name, change, message, format_, caplog):
    keys = sorted(load_file(folder / WEIGHTS))[:2] if change == "drop" else ["extra.weight", "extra.bias"]
    state = change_weights(folder, **{change: keys})
    if format_ == "bin":
        (folder / WEIGHTS).unlink()
        torch.save(state, folder / "diffusion_pytorch_model.bin")
    for options in ({}, {"low_cpu_mem_usage": False}):
        refused(lambda options=options: KINDS[name].from_pretrained(folder, **options), str(folder), message)
    assert caplog.text == ""
    load = load_model if name == "DiT" else lambda _, __, *more: load_tokenizer(*more)
    refused(lambda: load(KINDS[name], "model", folder, "cpu"), str(folder), message)


def test_missing_files_are_refused_without_further_lines(folder, name, caplog):
    (folder / WEIGHTS).unlink()
    load = load_tokenizer if name != "DiT" else lambda *source: load_model(DiT, "generator", *source)
    refused(lambda: load(folder, "cpu"), f"{folder}: the checkpoint cannot be loaded")
    assert caplog.text == ""


def test_a_weight_that_is_missing_from_its_shard_is_refused(tmp_path):
    """diffusers trusts the index and leaves the parameter on the meta device."""
    MODELS["DiT"]().save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    shard = tmp_path / index["final_layer.linear.weight"]
    state = load_file(shard)
    del state["final_layer.linear.weight"]
    save_file(state, shard, {"format": "pt"})
    refused(lambda: DiT.from_pretrained(tmp_path), r"final_layer\.linear\.weight is missing from its weights")


def test_options_that_are_not_understood_raise(folder, name):
    kind = KINDS[name]
    for option in ("num_head", "latent_channel", "checkpoint", "state_dict"):
        refused(
            lambda option=option: kind.from_pretrained(folder, **{option: 12}),
            f"unexpected argument '{option}'",
        )
    for dtype in ("float16", "auto", 16):
        refused(
            lambda dtype=dtype: kind.from_pretrained(folder, torch_dtype=dtype), "expected a dtype such as"
        )
    loaded = kind.from_pretrained(folder, dtype=torch.float64, local_files_only=True, token=None)
    assert loaded.dtype == torch.float64


def test_an_autoencoder_kl_takes_the_entries_of_its_own_config(tmp_path):
    diffusers_vae().save_pretrained(tmp_path)
    assert NestedAutoencoderKL.from_pretrained(tmp_path, scaling_factor=0.5).config.scaling_factor == 0.5
    refused(
        lambda: NestedAutoencoderKL.from_pretrained(tmp_path, default_ratio=2),
        "AutoencoderKL: unexpected argument 'default_ratio'",
    )


def test_all_options_of_diffusers_are_known():
    source = inspect.getsource(ModelMixin.from_pretrained.__func__)
    taken = set(re.findall(r'kwargs\.pop\("(\w+)"', source))
    assert len(taken) > 20
    assert taken <= set(LOADING_OPTIONS)


def test_unknown_config_entries_are_refused(tmp_path):
    for name in ("DiT", "NestedAutoencoderKL"):
        folder = tmp_path / name
        MODELS[name]().save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        entry = "latent_channel" if name == "NestedAutoencoderKL" else "hidden_sizes"
        (folder / "config.json").write_text(json.dumps(config | {entry: 4}))
        meant = {"latent_channel": "latent_channels", "hidden_sizes": "hidden_size"}[entry]
        refused(
            lambda name=name, folder=folder: KINDS[name].from_pretrained(folder),
            rf"unknown entry '{entry}' \(did you mean '{meant}'",
        )


def test_an_autoencoder_kl_with_one_level_is_refused(tmp_path):
    """It does not downsample, so it has no ratio."""
    kinds = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    diffusers_vae(block_out_channels=(8,), **kinds).save_pretrained(tmp_path)
    message = f"{tmp_path}: an autoencoder with one level, of 8 channels, does not downsample"
    refused(lambda: NestedAutoencoderKL.from_pretrained(tmp_path), message)
    refused(lambda: load_tokenizer(tmp_path, "cpu"), message)


def test_loading_and_casting_print_no_warning(folder, name, caplog, tmp_path):
    """diffusers warns at each cast of modules to keep in float32, even if there are none."""
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        logging.getLogger("diffusers").addHandler(caplog.handler)
        try:
            model = KINDS[name].from_pretrained(folder)
            model.to(torch.bfloat16)
            model.to("cpu", dtype=torch.float16)
            model.to(torch.device("cpu"))
        finally:
            logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert model.dtype == torch.float16
    assert caplog.text == ""


def test_modules_to_keep_in_float32_are_still_named(monkeypatch, caplog):
    monkeypatch.setattr(DiT, "_keep_in_fp32_modules", ["final_layer"])
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        MODELS["DiT"]().to(torch.float16)
    finally:
        logger.removeHandler(caplog.handler)
    assert "should be kept in float32: ['final_layer']" in caplog.text
