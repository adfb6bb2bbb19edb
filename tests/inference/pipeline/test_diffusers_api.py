"""CATPipeline as a diffusers pipeline: the calls that diffusers' own pipeline tests make."""

import inspect
import json
import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

from cat_fast.complexity import RatioThresholds
from cat_fast.errors import UserError
from cat_fast.generator import DiT, make_schedule, paper_schedule
from cat_fast.inference import CATOutput, CATPipeline
from tests.inference.pipeline.conftest import DESCRIPTIONS, LABELS

FAST = {"num_inference_steps": 3, "scheduler": "ddim", "ratio": 16}


def draw(pipeline, prompts="village street", seed=0, **options):
    """Images in [0, 1], (N, H, W, 3), each drawn from a generator of its own."""
    count = 1 if isinstance(prompts, str) else len(prompts)
    generator = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    return pipeline(prompts, **FAST | {"generator": generator, "output_type": "np"} | options).images


def test_components_are_the_parts(pipeline, parts):
    assert isinstance(pipeline, DiffusionPipeline)
    assert set(pipeline.components) == {"vae", "transformer", "scheduler", "text_encoder"}
    assert (pipeline.vae, pipeline.transformer, pipeline.text_encoder) == (*parts, None)
    again = CATPipeline(**pipeline.components, labels=LABELS)
    assert np.array_equal(draw(again), draw(pipeline))


def test_from_pipe_keeps_components_and_settings(pipeline):
    again = CATPipeline.from_pipe(pipeline)
    assert again.transformer is pipeline.transformer
    assert (again.labels, again.thresholds) == (LABELS, RatioThresholds(3, 7))


def test_call_arguments_have_the_names_of_diffusers():
    known = inspect.signature(CATPipeline.__call__).parameters
    expected = {
        "height", "width", "num_inference_steps", "guidance_scale", "generator", "output_type",
        "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
    }  # fmt: skip
    assert expected <= set(known)
    assert not {"steps", "guidance", "size", "seed", "on_step"} & set(known)
    assert (known["output_type"].default, known["return_dict"].default) == ("pil", True)


def test_model_index_has_the_form_of_diffusers(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "CATPipeline"
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert index["vae"][1] == "NestedAutoencoderKL"
    assert index["transformer"][1] == "DiT"
    assert index["text_encoder"] == [None, None]
    assert (index["labels"], index["thresholds"], index["resolution"]) == (LABELS, [3, 7], 64)
    assert {path.name for path in saved.iterdir()} == {"model_index.json", "vae", "transformer", "scheduler"}


def test_a_saved_pipeline_draws_the_same_images(pipeline, saved, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    loaded = CATPipeline.from_pretrained(saved)
    assert (loaded.labels, loaded.thresholds, loaded.resolution) == (LABELS, RatioThresholds(3, 7), 64)
    assert loaded.descriptions == DESCRIPTIONS
    assert loaded.name_or_path == str(saved)
    assert not loaded.vae.training
    assert not loaded.transformer.training
    assert np.array_equal(draw(loaded, LABELS), draw(pipeline, LABELS))
    assert not caplog.text  # diffusers warns of unexpected settings and types


def test_a_pipeline_saved_again_is_the_same(saved, tmp_path):
    CATPipeline.from_pretrained(saved).save_pretrained(tmp_path)
    index, again = (json.loads((folder / "model_index.json").read_text()) for folder in (saved, tmp_path))
    assert {key: value for key, value in again.items() if key != "_name_or_path"} == index
    for part in ("vae", "transformer"):
        (path,) = (saved / part).glob("*.safetensors")
        assert (tmp_path / part / path.name).read_bytes() == path.read_bytes()


def test_diffusion_pipeline_resolves_the_class(pipeline, saved):
    assert diffusers.CATPipeline is CATPipeline
    loaded = DiffusionPipeline.from_pretrained(str(saved))
    assert type(loaded) is CATPipeline
    assert np.array_equal(draw(loaded), draw(pipeline))


def test_components_and_settings_given_to_from_pretrained_are_used(pipeline, saved):
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    loaded = CATPipeline.from_pretrained(
        saved, transformer=pipeline.transformer, scheduler=scheduler, thresholds=(2, 5), resolution=128
    )
    assert loaded.transformer is pipeline.transformer
    assert loaded.scheduler is scheduler
    assert (loaded.thresholds, loaded.resolution) == (RatioThresholds(2, 5), 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_to_dtype(saved, dtype):
    loaded = CATPipeline.from_pretrained(saved)
    expected = draw(loaded)
    assert loaded.to(dtype) is loaded
    assert (loaded.dtype, loaded.vae.dtype, loaded.transformer.dtype) == (dtype,) * 3
    assert np.abs(draw(loaded) - expected).max() < 0.1


def test_to_device_and_dtype(saved):
    loaded = CATPipeline.from_pretrained(saved).to("cpu", torch.bfloat16)
    assert (loaded.device, loaded.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert loaded.to(device="cpu", dtype=torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="first corresponds to `device`"):
        loaded.to(torch.float32, "cpu")


def test_loading_in_another_dtype(saved):
    """Rounded weights have another fingerprint, which must not be taken for another tokenizer."""
    loaded = CATPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16)
    assert (loaded.vae.dtype, loaded.transformer.dtype) == (torch.bfloat16, torch.bfloat16)
    assert np.isfinite(draw(loaded)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pipeline_saved_in_another_dtype(saved, tmp_path, dtype):
    """Loaded without a dtype its weights are float32 again, but still rounded."""
    half = CATPipeline.from_pretrained(saved).to(dtype)
    half.save_pretrained(tmp_path)
    for kind in (CATPipeline, DiffusionPipeline):
        assert np.abs(draw(kind.from_pretrained(str(tmp_path))) - draw(half)).max() < 0.1


def test_loading_with_a_dtype_per_component(saved):
    loaded = CATPipeline.from_pretrained(saved, torch_dtype={"transformer": torch.bfloat16})
    assert (loaded.vae.dtype, loaded.transformer.dtype) == (torch.float32, torch.bfloat16)
    assert np.isfinite(draw(loaded)).all()


def test_variants(saved, tmp_path):
    half = CATPipeline.from_pretrained(saved).to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = CATPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert loaded.dtype == torch.float16
    assert np.array_equal(draw(loaded), draw(half))
    with pytest.raises(UserError, match="no such modeling files"):
        CATPipeline.from_pretrained(saved, variant="fp16")
    with pytest.raises(UserError, match=r"is not a complete pipeline: .*vae"):
        CATPipeline.from_pretrained(tmp_path)


def test_sharded_weights(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    assert np.array_equal(draw(CATPipeline.from_pretrained(tmp_path)), draw(pipeline))


def test_tuple_and_output_are_equivalent(pipeline):
    output = pipeline(LABELS, **FAST, generator=[torch.Generator().manual_seed(i) for i in range(3)])
    assert isinstance(output, CATOutput)
    assert output["images"] is output[0] is output.images
    images, ratios, tokens = pipeline(
        LABELS, **FAST, generator=[torch.Generator().manual_seed(i) for i in range(3)], return_dict=False
    )
    assert (ratios, tokens) == (output.ratios, output.tokens) == ([16] * 3, [4] * 3)
    assert all(np.array_equal(one, other) for one, other in zip(images, output.images, strict=True))


def test_pil_np_and_pt_outputs_are_equivalent(pipeline):
    pil = np.stack([np.asarray(image) for image in draw(pipeline, LABELS, output_type="pil")])
    array, tensor = draw(pipeline, LABELS), draw(pipeline, LABELS, output_type="pt")
    assert (array.shape, array.dtype, tensor.shape) == ((3, 64, 64, 3), np.float32, (3, 3, 64, 64))
    assert (array.min() >= 0) & (array.max() <= 1)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal(np.round(array * 255), pil)


def test_latent_output_is_what_the_images_are_decoded_from(pipeline):
    latents = draw(pipeline, LABELS, ratio="auto", output_type="latent")
    ratios = [request.ratio for request in pipeline.plan(LABELS)]
    assert [tuple(latent.shape) for latent in latents] == [(4, 64 // f, 64 // f) for f in ratios]
    config = pipeline.transformer.config
    shift, scale = (torch.tensor(v).view(-1, 1, 1) for v in (config.shift_factor, config.scaling_factor))
    images = draw(pipeline, LABELS, ratio="auto", output_type="pt")
    for latent, ratio, image in zip(latents, ratios, images, strict=True):
        decoded = pipeline.vae.decode((latent / scale + shift)[None], ratio).sample[0]
        torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), image)


def test_one_generator_for_one_image_is_that_generator(pipeline):
    given = draw(pipeline, generator=torch.Generator().manual_seed(5))
    assert np.array_equal(given, draw(pipeline, ["village street"], seed=5))
    batched = draw(pipeline, ["clear blue sky", "village street"], seed=4)
    assert np.array_equal(batched[1], given[0])


def test_one_generator_for_several_images_is_reproducible(pipeline):
    first, again, other = (
        draw(pipeline, LABELS, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)
    )
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    generator = torch.Generator().manual_seed(7)
    draw(pipeline, LABELS, generator=generator)
    assert np.abs(draw(pipeline, LABELS, generator=generator) - first).max() > 0.01  # it has advanced
    same_class = draw(pipeline, ["village street"] * 2, generator=torch.Generator().manual_seed(7))
    assert np.abs(same_class[0] - same_class[1]).max() > 0.01


def test_without_a_generator_torchs_default_one_counts(pipeline):
    torch.manual_seed(1)
    first, second = (draw(pipeline, LABELS, generator=None) for _ in range(2))
    assert np.abs(first - second).max() > 0.01
    torch.manual_seed(1)
    assert np.array_equal(draw(pipeline, LABELS, generator=None), first)


def test_batches_of_several_sizes(pipeline):
    for count in (1, 2, 5):
        assert draw(pipeline, ["village street"] * count).shape == (count, 64, 64, 3)


def test_guidance_scale_changes_the_image_and_1_disables_it(pipeline, monkeypatch):
    rows = []
    forward = DiT.forward

    def record(packed):
        if packed.device.type != "meta":  # FLOPs are counted there
            rows.append(
                int((packed.grid == 2).all(1).sum())
            )  # null sequences that fill up the pack are smaller

    monkeypatch.setattr(
        DiT,
        "forward",
        lambda self, packed, *a, **k: record(packed) or forward(self, packed, *a, **k),
    )
    plain, guided = draw(pipeline, guidance_scale=1), draw(pipeline, guidance_scale=4.0)
    assert np.abs(plain - guided).max() > 0.005
    assert rows == [1] * 3 + [2] * 3
    per_ratio = draw(pipeline, guidance_scale={8: 1.0, 16: 4.0, 32: 1.0}, ratio=16)
    assert np.array_equal(per_ratio, draw(pipeline, guidance_scale=4.0, ratio=16))


def test_progress_bar(pipeline, capsys):
    pipeline.set_progress_bar_config()
    pipeline("village street", **FAST)
    assert "3/3" in capsys.readouterr().err
    pipeline([1, 1, 1], **FAST | {"ratio": 8, "max_tokens": 32})
    assert "9/9" in capsys.readouterr().err  # three batches
    pipeline.set_progress_bar_config(disable=True)
    pipeline("village street", **FAST)
    assert capsys.readouterr().err == ""


def test_callback_on_every_step(pipeline):
    calls = []

    def callback(pipe, step, timestep, values):
        calls.append((pipe, step, int(timestep), values["latents"]))
        return values

    assert np.array_equal(draw(pipeline, LABELS, callback_on_step_end=callback), draw(pipeline, LABELS))
    assert all(pipe is pipeline for pipe, *_ in calls)
    assert [step for _, step, *_ in calls] == [0, 1, 2]
    timesteps = [timestep for *_, timestep, _ in calls]
    assert timesteps == sorted(timesteps, reverse=True)
    assert [tuple(latent.shape) for latent in calls[0][3]] == [(4, 4, 4)] * 3
    final = draw(pipeline, LABELS, output_type="latent")
    assert all(torch.equal(one, other) for one, other in zip(calls[-1][3], final, strict=True))


def test_callback_replaces_latents(pipeline):
    def zero_at_the_end(pipe, step, timestep, values):
        if step == 2:
            values["latents"] = [torch.zeros_like(latent) for latent in values["latents"]]
        return values

    latents = draw(pipeline, LABELS, output_type="latent", callback_on_step_end=zero_at_the_end)
    assert [latent.any().item() for latent in latents] == [False] * 3


def test_callback_tensor_inputs(pipeline):
    seen = []
    draw(
        pipeline,
        callback_on_step_end=lambda *args: seen.append(args[3]),
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen == [{}] * 3
    with pytest.raises(UserError, match="callback_on_step_end_tensor_inputs 'noise': expected 'latents'"):
        draw(
            pipeline,
            callback_on_step_end=lambda *_: None,
            callback_on_step_end_tensor_inputs=["noise"],
        )


def test_the_scheduler_can_be_replaced(pipeline):
    by_name = draw(pipeline)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    assert np.array_equal(draw(pipeline, scheduler=None), by_name)
    assert pipeline.config["scheduler"] == ("diffusers", "DDIMScheduler")


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_a_replaced_scheduler_is_saved(pipeline, tmp_path, scheduler):
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path)
    loaded = CATPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is scheduler
    assert np.array_equal(draw(loaded, scheduler=None), draw(pipeline, scheduler=None))


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, PNDMScheduler])
def test_a_scheduler_that_is_not_supported_is_refused(parts, pipeline, scheduler):
    with pytest.raises(
        UserError, match=f"scheduler: expected a DDPMScheduler or .*, got a {scheduler.__name__}"
    ):
        CATPipeline(*parts, scheduler())
    pipeline.scheduler = scheduler()
    with pytest.raises(UserError, match=f"got a {scheduler.__name__}"):
        draw(pipeline, scheduler=None)


@pytest.mark.parametrize(("schedule", "name"), [(paper_schedule(), "ddpm"), (make_schedule("flow"), "euler")])
def test_the_default_scheduler_is_the_one_of_training(parts, schedule, name):
    made = CATPipeline(*parts, schedule, labels=LABELS)
    assert np.array_equal(draw(made, scheduler=None), draw(made, scheduler=name))


@pytest.mark.parametrize("part", ["vae", "transformer", "scheduler", "text_encoder"])
def test_a_component_of_another_class_is_refused(pipeline, part):
    parts = pipeline.components | {part: torch.nn.Linear(1, 1)}
    with pytest.raises(UserError, match=f"^{part}: expected a .*, got a Linear$"):
        CATPipeline(**parts)


def test_model_offload_order(pipeline):
    assert CATPipeline.model_cpu_offload_seq == "text_encoder->transformer->vae"
    assert set(CATPipeline.model_cpu_offload_seq.split("->")) | {"scheduler"} == set(pipeline.components)


def test_offloaded_models_move_one_after_another(pipeline):
    """Hooks on the CPU: they are called as for an accelerator, and nothing else changes."""
    expected = draw(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    moved = []
    for name in ("transformer", "vae"):
        hook = getattr(pipeline, name)._hf_hook
        pre_forward = hook.pre_forward

        def record(module, *args, _name=name, _forward=pre_forward, **kwargs):
            if _name not in moved[-1:]:
                moved.append(_name)
            return _forward(module, *args, **kwargs)

        hook.pre_forward = record
    try:
        assert np.array_equal(draw(pipeline), expected)
        assert moved == ["transformer", "vae"]
        assert np.array_equal(draw(pipeline), expected)
    finally:
        pipeline.remove_all_hooks()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_offloading_without_an_accelerator_is_refused(pipeline):
    with pytest.raises(RuntimeError, match="requires accelerator"):
        pipeline.enable_model_cpu_offload()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloading_draws_the_same_images(saved):
    loaded = CATPipeline.from_pretrained(saved)
    expected = draw(loaded.to("cuda"))
    loaded.enable_model_cpu_offload()
    for _ in range(2):
        assert np.abs(draw(loaded) - expected).max() < 1e-3
        assert {loaded.vae.device.type, loaded.transformer.device.type} == {"cpu"}


def test_settings_are_read_only(pipeline):
    for name in ("labels", "thresholds", "descriptions", "resolution"):
        with pytest.raises(AttributeError):
            setattr(pipeline, name, None)


def test_a_compiled_transformer_is_accepted(pipeline):
    expected = draw(pipeline)
    compiled = torch.compile(pipeline.transformer, backend="eager")
    again = CATPipeline(**pipeline.components | {"transformer": compiled}, labels=LABELS)
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(again), expected, atol=1e-5, rtol=0)


def test_tiling_and_slicing_of_the_vae(pipeline):
    expected = draw(pipeline, LABELS)
    pipeline.vae.enable_slicing()
    try:
        torch.testing.assert_close(draw(pipeline, LABELS), expected, atol=1e-5, rtol=0)
    finally:
        pipeline.vae.disable_slicing()
