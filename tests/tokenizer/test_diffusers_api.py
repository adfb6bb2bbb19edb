"""diffusers' model API on the nested VAE: the calls that its own tests, pipelines and users make.

diffusers' wheel ships no test mixins; this is our list of the calls in them. `fixed` has one ratio, like any
AutoencoderKL, `nested` has three.
"""

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel

from cat_fast import NestedAutoencoderKL
from tests.tokenizer.test_autoencoder import perturbed, tiny

KINDS = {
    "fixed": {"block_out_channels": (8, 8, 16, 16), "ratios": (8,)},
    "nested": {"ratios": (8, 16, 32)},
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def build(kind="fixed", **changes):
    return perturbed(tiny(**KINDS[kind] | changes))


def images(batch=2, side=64):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


@torch.no_grad()
def output(model):
    return model(images()).sample


@pytest.fixture(params=KINDS)
def model(request):
    return build(request.param)


# Signatures and outputs


@pytest.mark.parametrize("method", ["encode", "decode", "forward"])
def test_methods_accept_the_keywords_of_autoencoder_kl(method):
    ours = inspect.signature(getattr(NestedAutoencoderKL, method)).parameters
    theirs = inspect.signature(getattr(AutoencoderKL, method)).parameters
    assert list(ours)[:2] == list(theirs)[:2]
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default
    assert ours.keys() - theirs.keys() == {"ratio"}


@pytest.mark.parametrize(
    "name", ["scaling_factor", "shift_factor", "force_upcast", "latents_mean", "latents_std"]
)
def test_the_config_has_the_entries_that_pipelines_read(model, name):
    assert name in model.config
    assert name in AutoencoderKL().config


@torch.no_grad()
def test_outputs_have_diffusers_types_and_the_shapes_of_the_ratio(model):
    encoded = model.encode(images())
    side = 64 // model.default_ratio
    assert isinstance(encoded, AutoencoderKLOutput)
    assert isinstance(encoded.latent_dist, DiagonalGaussianDistribution)
    assert encoded.latent_dist.mode().shape == (2, 4, side, side)
    decoded = model.decode(encoded.latent_dist.mode())
    assert isinstance(decoded, DecoderOutput)
    assert decoded.sample.shape == (2, 3, 64, 64)
    assert model(sample=images()).sample.shape == (2, 3, 64, 64)


@torch.no_grad()
def test_return_dict_false_returns_tuples_of_the_same(model):
    (posterior,) = model.encode(images(), return_dict=False)
    assert torch.equal(posterior.parameters, model.encode(images()).latent_dist.parameters)
    z = posterior.mode()
    (decoded,) = model.decode(z, return_dict=False)
    assert torch.equal(decoded, model.decode(z).sample)
    (sample,) = model(images(), return_dict=False)
    assert torch.equal(sample, model(images()).sample)
    assert model(images())[0] is not None
    assert model(images()).to_tuple()[0].shape == sample.shape


@torch.no_grad()
def test_forward_decodes_the_mode_or_a_draw_of_the_generator(model):
    posterior = model.encode(images()).latent_dist
    assert torch.equal(output(model), model.decode(posterior.mode()).sample)
    draws = [
        model(images(), sample_posterior=True, generator=torch.Generator().manual_seed(seed)).sample
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    z = posterior.sample(generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.decode(z, generator=torch.Generator()).sample, draws[0])


def test_outputs_are_deterministic(model):
    assert torch.equal(output(model), output(model))


def test_the_documented_example_runs():
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    assert names["reconstructions"].shape == names["images"].shape
    assert [image.shape for image in names["decoded"]] == [(3, 128, 128)] * 2


# The default ratio


@torch.no_grad()
@pytest.mark.parametrize(
    ("ratios", "default_ratio", "expected"),
    [((8,), None, 8), ((8, 16, 32), None, 16), ((8, 32), None, 8), ((8, 16, 32), 32, 32)],
)
def test_without_a_ratio_the_default_ratio_is_used(ratios, default_ratio, expected):
    model = perturbed(tiny(ratios=ratios, default_ratio=default_ratio))
    assert model.default_ratio == expected
    z = model.encode(images()).latent_dist.mode()
    assert torch.equal(z, model.encode(images(), expected).latent_dist.mode())
    assert torch.equal(model.decode(z).sample, model.decode(z, expected).sample)
    assert torch.equal(output(model), model(images(), expected).sample)


def test_the_default_ratio_is_one_of_the_ratios():
    with pytest.raises(ValueError, match="default_ratio: expected one of 8, 16, 32, got 4"):
        tiny(default_ratio=4)


def test_the_default_ratio_is_saved(tmp_path):
    build("nested", default_ratio=32).save_pretrained(tmp_path)
    assert NestedAutoencoderKL.from_pretrained(tmp_path).default_ratio == 32


def test_a_folder_without_the_newer_config_entries_loads(tmp_path):
    model = build("nested")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("default_ratio", "force_upcast", "latents_mean", "latents_std"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = NestedAutoencoderKL.from_pretrained(tmp_path)
    assert loaded.default_ratio == 16
    assert loaded.fingerprint() == model.fingerprint()
    assert torch.equal(output(loaded), output(model))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda vae: vae.encode([torch.zeros(3, 64, 64)]), TypeError, "got list; use encode_mixed"),
        (lambda vae: vae.decode([torch.zeros(4, 8, 8)]), TypeError, "got list; use decode_mixed"),
        (
            lambda vae: vae.encode(torch.zeros(2, 3, 64, 64), [8, 16]),
            TypeError,
            r"integer ratio, got \[8, 16\]",
        ),
        (lambda vae: vae.decode(torch.zeros(2, 4, 8, 8), False), TypeError, "return_dict by keyword"),
        (lambda vae: vae.encode(torch.zeros(3, 64, 64)), ValueError, r"expected shape \(B, 3, H, W\)"),
        (lambda vae: vae.decode(torch.zeros(1, 3, 8, 8)), ValueError, r"\(B, 4, H, W\), got \(1, 3, 8, 8\)"),
        (lambda vae: vae(torch.zeros(1, 3, 64, 64), 4), ValueError, "ratio 4 is not available"),
        (lambda vae: vae.encode_mixed(torch.zeros(2, 3, 64, 64), 8), TypeError, "got 8 for all; use encode"),
        (lambda vae: vae.decode_mixed([torch.zeros(4, 8, 8)], [8, 8]), ValueError, "got 2 for 1"),
    ],
)
def test_unsuitable_inputs_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(build("nested"))


# Saving and loading


@pytest.mark.parametrize("safe_serialization", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_saved_models_load_with_the_same_output(model, tmp_path, safe_serialization, variant):
    model.save_pretrained(tmp_path, safe_serialization=safe_serialization, variant=variant)
    loaded, info = NestedAutoencoderKL.from_pretrained(tmp_path, variant=variant, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not loaded.training
    assert torch.equal(output(loaded), output(model))
    if variant:
        with pytest.raises(OSError, match="no file named"):
            NestedAutoencoderKL.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_torch_dtype_is_the_dtype_of_the_loaded_model(tmp_path, dtype, low_cpu_mem_usage):
    build().to(dtype).save_pretrained(tmp_path)
    loaded = NestedAutoencoderKL.from_pretrained(
        tmp_path, torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert loaded.dtype == dtype
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert NestedAutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.float32).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_gives_close_outputs(model, dtype):
    expected = output(model)
    half = model.to(dtype)(images().to(dtype)).sample
    assert half.dtype == dtype
    assert (half.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_modules_to_keep_in_fp32_stay_so(tmp_path, monkeypatch):
    build().save_pretrained(tmp_path)
    monkeypatch.setattr(NestedAutoencoderKL, "_keep_in_fp32_modules", ["quant_conv"])
    loaded = NestedAutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.float16)
    dtypes = {name: p.dtype for name, p in loaded.named_parameters()}
    assert dtypes["quant_conv.weight"] == torch.float32
    assert dtypes["encoder.conv_in.weight"] == torch.float16


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("parallel", [False, True])
def test_sharded_checkpoints_load(model, tmp_path, monkeypatch, variant, parallel):
    model.save_pretrained(tmp_path, max_shard_size="50KB", variant=variant)
    name = "diffusion_pytorch_model.safetensors.index" + (f".{variant}" if variant else "") + ".json"
    index = json.loads((tmp_path / name).read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    assert {path.name for path in tmp_path.glob("*.safetensors")} == shards
    assert index["weight_map"].keys() == model.state_dict().keys()
    monkeypatch.setenv("HF_ENABLE_PARALLEL_LOADING", "yes" if parallel else "no")
    loaded = NestedAutoencoderKL.from_pretrained(tmp_path, variant=variant)
    assert torch.equal(output(loaded), output(model))


PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        "balanced",
        {"": "cpu"},
        dict.fromkeys(PARTS, "cpu"),
        dict.fromkeys(PARTS, "cpu") | {"decoder": "disk"},
    ],
    ids=["auto", "balanced", "one device", "per part", "disk"],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_device_maps_are_respected(tmp_path, device_map, sharded):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="50KB" if sharded else "1GB")
    # Without it, accelerate takes the first GPU; on a CPU it is the CPU.
    memory = None if isinstance(device_map, dict) else {"cpu": "1GB"}
    loaded = NestedAutoencoderKL.from_pretrained(
        tmp_path, device_map=device_map, max_memory=memory, offload_folder=tmp_path / "offload"
    )
    places = {str(device) for device in loaded.hf_device_map.values()}
    assert places == (set(device_map.values()) if isinstance(device_map, dict) else {"cpu"})
    on_disk = {name.split(".")[0] for name, p in loaded.named_parameters() if p.device.type == "meta"}
    assert on_disk == ({"decoder"} if "disk" in places else set())
    torch.testing.assert_close(output(loaded), output(model))
    with torch.no_grad():  # past forward, which is what accelerate hooks
        z = loaded.encode(images()).latent_dist.mode()
        torch.testing.assert_close(loaded.decode(z).sample, output(model))


def test_device_maps_keep_each_half_together():
    assert set(build()._get_no_split_modules("auto")) == {"NestedEncoder", "NestedDecoder"}


def test_a_mismatched_checkpoint_is_refused_unless_ignored(tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"size mismatch|shape"):
        NestedAutoencoderKL.from_pretrained(tmp_path, latent_channels=8)
    loaded = NestedAutoencoderKL.from_pretrained(
        tmp_path, latent_channels=8, ignore_mismatched_sizes=True, low_cpu_mem_usage=False
    )
    assert loaded.config.latent_channels == 8


def test_a_compiled_model_saves_as_the_model(tmp_path):
    model = build()
    torch.compile(model, backend="eager").save_pretrained(tmp_path)
    loaded = NestedAutoencoderKL.from_pretrained(tmp_path)
    assert type(loaded) is NestedAutoencoderKL
    assert torch.equal(output(loaded), output(model))


# Config and attributes


def test_the_config_round_trips(model, tmp_path):
    model.save_config(tmp_path)
    config = NestedAutoencoderKL.load_config(tmp_path)
    again = NestedAutoencoderKL.from_config(config)
    for name, value in model.config.items():
        if not name.startswith("_"):
            assert again.config[name] == (list(value) if isinstance(value, tuple) else value), name
    assert again.ratios == model.ratios
    assert config["_class_name"] == "NestedAutoencoderKL"
    assert json.loads(model.to_json_string())["latent_channels"] == 4


def test_from_config_takes_changed_entries():
    changed = NestedAutoencoderKL.from_config(build().config, latent_channels=8, default_ratio=8)
    assert changed.config.latent_channels == 8
    assert changed.quant_conv.weight.shape == (16, 16, 1, 1)


def test_register_to_config_adds_and_changes_entries():
    model = build()
    model.register_to_config(scaling_factor=0.5, note="added")
    assert model.config.scaling_factor == 0.5
    assert model.config["note"] == "added"


def test_statistics_of_the_latents_are_kept_and_checked(tmp_path):
    model = build(latents_mean=(0.0, 0.1, 0.2, 0.3), latents_std=(1.0, 2.0, 3.0, 4.0), force_upcast=False)
    model.save_pretrained(tmp_path)
    config = NestedAutoencoderKL.from_pretrained(tmp_path).config
    assert list(config.latents_mean) == [0.0, 0.1, 0.2, 0.3]
    assert list(config.latents_std) == [1.0, 2.0, 3.0, 4.0]
    assert not config.force_upcast
    with pytest.raises(ValueError, match="latents_std: expected one value per latent channel, 4, got 1"):
        tiny(latents_std=(1.0,))


def test_attributes_behave_as_in_other_models():
    model = build()
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    with pytest.warns(FutureWarning, match="scaling_factor"):
        assert model.scaling_factor == model.config.scaling_factor
    with pytest.raises(AttributeError, match="'NestedAutoencoderKL' object has no attribute 'missing'"):
        _ = model.missing
    assert model.get_submodule("encoder.down_blocks.0") is model.encoder.down_blocks[0]
    assert isinstance(model, ModelMixin)


def test_parameters_are_counted(model):
    count = sum(p.numel() for p in model.parameters())
    assert model.num_parameters() == count
    assert model.get_memory_footprint() == 4 * count
    model.encoder.requires_grad_(False)
    trained = model.num_parameters(only_trainable=True)
    assert trained == count - sum(p.numel() for p in model.encoder.parameters())


# Tiling, slicing, offloading


@torch.no_grad()
def test_tiling_is_switched_on_and_off(model):
    assert model.use_tiling is False
    before = output(model)
    model.enable_tiling()
    assert model.use_tiling is True
    assert (model.tile_sample_min_size, model.tile_overlap_factor) == (512, 0.25)
    assert torch.equal(output(model), before)  # smaller than a tile
    model.disable_tiling()
    assert model.use_tiling is False
    assert torch.equal(output(model), before)


@torch.no_grad()
@pytest.mark.parametrize("by", ["keywords", "attributes"])
def test_tile_sizes_are_set_by_keyword_or_attribute(by):
    model, calls = build(), []
    model.encoder.register_forward_hook(lambda _, args, __: calls.append(tuple(args[0].shape[2:])))
    if by == "keywords":
        model.enable_tiling(tile_sample_min_size=32, tile_overlap_factor=0.5)
    else:
        model.tile_sample_min_size, model.tile_overlap_factor, model.use_tiling = 32, 0.5, True
    tiled = output(model)
    assert tiled.shape == (2, 3, 64, 64)
    assert calls == [(32, 32)] * 9
    model.disable_tiling()
    assert not torch.equal(tiled, output(model))
    model.enable_tiling()  # keeps the sizes
    assert torch.equal(tiled, output(model))


@pytest.mark.parametrize("deep", [2, 6, 9])
def test_default_tiles_suit_every_depth(deep):
    tiny(
        block_out_channels=(8,) * deep, ratios=(2 ** (deep - 1),), mid_block_attention_head_dim=8
    ).enable_tiling()


@torch.no_grad()
def test_slicing_is_switched_on_and_off(model):
    batches = []
    model.decoder.register_forward_hook(lambda _, args, __: batches.append(len(args[0])))
    before = output(model)
    model.enable_slicing()
    assert model.use_slicing is True
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-4)
    model.disable_slicing()
    assert model.use_slicing is False
    assert torch.equal(output(model), before)
    assert batches == [2, 1, 1, 2]


@torch.no_grad()
@pytest.mark.parametrize("call", ["encode", "decode", "encode_mixed", "decode_mixed"])
def test_offload_hooks_run_before_methods_other_than_forward(call):
    moved = []

    class Recorder(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            moved.append(module)
            return args, kwargs

    model = build()
    add_hook_to_module(model, Recorder())
    x = images() if call.startswith("encode") else torch.zeros(2, 4, 8, 8)
    getattr(model, call)(x, [8, 8]) if call.endswith("mixed") else getattr(model, call)(x)
    assert moved


def test_layerwise_casting_stores_low_precision_and_computes_in_float32():
    model = build()
    expected = output(model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert model.encoder.conv_in.weight.dtype == torch.bfloat16
    got = output(model)
    assert got.dtype == torch.float32
    assert (got - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_leaves_outputs_unchanged(model, offload_type):
    expected = output(model)
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, offload_type=offload_type, num_blocks_per_group=1)
    assert torch.equal(output(model), expected)


# Training


def test_a_training_step_reaches_every_parameter_of_a_fixed_model():
    model = build().train()
    ema = EMAModel(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    loss = (model(images(), sample_posterior=True).sample - images()).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    ema.step(model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert model.train(False) is model
    assert not model.training


def test_gradient_checkpointing_is_switched_on_and_off(model):
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    assert model.encoder.gradient_checkpointing
    assert model.decoder.gradient_checkpointing
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


def test_gradient_checkpointing_leaves_gradients_unchanged(model):
    model.train()

    def gradients():
        model.zero_grad()
        model(images()).sample.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_gradient_checkpointing()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


# Pipelines of diffusers


def dit_pipeline(vae):
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_embeds_ada_norm=1000,
    ).eval()
    pipeline = DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **options):
    generator = torch.Generator().manual_seed(0)
    return pipeline([1, 2], num_inference_steps=2, generator=generator, **options).images


def test_a_dit_pipeline_draws_with_a_fixed_model():
    vae = build(scaling_factor=0.5)
    pipeline = dit_pipeline(vae)
    seen = []
    vae.decoder.register_forward_hook(lambda _, args, out: seen.append(out))
    drawn = draw(pipeline, output_type="np")
    assert drawn.shape == (2, 64, 64, 3)
    expected = (seen[0] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(drawn, expected)
    assert [image.size for image in draw(pipeline)] == [(64, 64)] * 2
    assert draw(pipeline.to(torch.bfloat16), output_type="pt").dtype == torch.bfloat16


def test_a_dit_pipeline_with_our_model_is_saved_and_loaded(tmp_path):
    pipeline = dit_pipeline(build())
    pipeline.save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.vae) is NestedAutoencoderKL
    np.testing.assert_array_equal(draw(loaded, output_type="np"), draw(pipeline, output_type="np"))


@torch.no_grad()
def test_the_image_processor_fits_a_model_as_deep_as_its_ratio():
    vae = build()
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    assert scale == vae.default_ratio
    processor = VaeImageProcessor(vae_scale_factor=scale)
    pixels = processor.preprocess(np.full((70, 90, 3), 0.5, dtype=np.float32))
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    assert processor.postprocess(decoded)[0].size == (88, 64)


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, StableDiffusionImg2ImgPipeline])
def test_stable_diffusion_pipelines_draw_with_a_fixed_model(kind):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    pipeline = kind(
        vae=build(scaling_factor=0.5),
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    prompt = torch.rand(1, 3, 8)
    sizes = (
        {"height": 64, "width": 96} if kind is StableDiffusionPipeline else {"image": images(1, 64) / 2 + 0.5}
    )
    drawn = pipeline(
        prompt_embeds=prompt,
        negative_prompt_embeds=-prompt,
        num_inference_steps=2,
        output_type="np",
        **sizes,
    ).images
    assert drawn.shape == (1, 64, sizes.get("width", 64), 3)
    assert np.isfinite(drawn).all()
