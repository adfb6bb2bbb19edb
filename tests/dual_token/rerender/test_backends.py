"""Both back ends against the pipelines they come from, and folders that are refused."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline

from benchmarks.shared.inversion_round_trip import TEXT_LENGTH, TEXT_WIDTH
from cat_fast.data.latents.scale import LatentScale
from cat_fast.dual_token.rerender.cat_pipeline import CATBackend
from cat_fast.dual_token.rerender.open import open_backend
from cat_fast.dual_token.rerender.stable_diffusion import StableDiffusionBackend
from cat_fast.errors import UserError
from cat_fast.generator import SampleRequest
from cat_fast.generator.sampling import denoise_step, prepare
from cat_fast.generator.solvers import set_steps
from tests.inference.pipeline.test_text_pipeline import make_pipeline


def test_stable_diffusion_equals_diffusers(stable_diffusion):
    backend = open_backend(str(stable_diffusion), "cpu")
    assert isinstance(backend, StableDiffusionBackend)
    pipeline = StableDiffusionPipeline.from_pretrained(stable_diffusion, safety_checker=None)
    theirs, null = pipeline.encode_prompt(["a red"], "cpu", 1, True)
    states = backend.text_target.states(["a red"])
    assert states[0].shape == (TEXT_LENGTH, TEXT_WIDTH)
    torch.testing.assert_close(states[0][None], theirs)
    torch.manual_seed(0)
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        conditional = pipeline.unet(z, 301, encoder_hidden_states=theirs).sample
        unconditional = pipeline.unet(z, 301, encoder_hidden_states=null).sample
    torch.testing.assert_close(backend.predict(z, 301.0, states), conditional)
    torch.testing.assert_close(backend.predict(z, 301.0, None), unconditional)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(images).latent_dist.mode() * 0.5
        decoded = pipeline.vae.decode(latents / 0.5).sample
    torch.testing.assert_close(backend.encode(images), latents)
    torch.testing.assert_close(backend.decode(latents), decoded)
    assert backend.default_size == (16, 16)
    assert backend.latent_shape((16, 32)) == (4, 8, 16)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_a_pipeline_of_this_package_predicts_as_its_sampler(cat_pipelines, kind):
    backend = open_backend(str(cat_pipelines[kind]), "cpu", ratio=16)
    assert isinstance(backend, CATBackend)
    transformer = backend.pipeline.transformer
    states = backend.text_target.states(["a red house"])
    scheduler = set_steps(backend.pipeline.scheduler, None, 4)
    request = SampleRequest(label=transformer.config.num_classes, ratio=16, grid=(2, 2), seed=3)
    state = prepare(transformer, request, scheduler, guidance=3.0, text=states[0])
    (guided,) = denoise_step(transformer, [state])
    z = state.latent(2)[None]
    timestep = float(state.solver.timestep)
    own, null = backend.predict(z, timestep, states), backend.predict(z, timestep, None)
    expected = state.latent(2, guided)[None]
    torch.testing.assert_close(torch.lerp(null, own, 3.0), expected, rtol=1e-4, atol=1e-5)
    trajectory = backend.trajectory(4, (64, 64), "ddim")
    if kind == "flow":  # with the shift of its number of tokens
        assert trajectory.timestep(4) == pytest.approx(timestep)
        following = float(state.solver.timesteps[1])
        assert trajectory.timestep(3) == pytest.approx(following)


def test_latents_have_the_transformers_scale(cat_pipelines):
    backend = open_backend(str(cat_pipelines["epsilon"]), "cpu", ratio=8)
    config = backend.pipeline.transformer.config
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        mode = backend.pipeline.vae.encode(images, 8).latent_dist.mode()
    expected = LatentScale(config.shift_factor, config.scaling_factor).apply(mode, 8)
    torch.testing.assert_close(backend.encode(images), expected)
    with torch.no_grad():
        torch.testing.assert_close(backend.decode(expected), backend.pipeline.vae.decode(mode, 8).sample)


def test_impossible_sizes_and_ratios_are_refused(stable_diffusion, cat_pipelines):
    backend = open_backend(str(stable_diffusion), "cpu")
    with pytest.raises(UserError, match="width of 18 px: expected a multiple of 4 px"):
        backend.check_size((16, 18))
    with pytest.raises(UserError, match="ratio: applies to pipelines of this package"):
        open_backend(str(stable_diffusion), "cpu", ratio=8)
    with pytest.raises(UserError, match="ratio 64: expected one of 8, 16, 32"):
        open_backend(str(cat_pipelines["flow"]), "cpu", ratio=64)
    ours = open_backend(str(cat_pipelines["flow"]), "cpu")
    assert ours.ratio == 8
    with pytest.raises(UserError, match="height of 40 px: expected a multiple of 32 px"):
        ours.check_size((40, 64))
    with pytest.raises(UserError, match="trained with text"):
        CATBackend(make_pipeline(text_dim=None), "classes")


def test_damaged_and_other_folders_are_refused(stable_diffusion, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_backend(str(tmp_path / "x"), "cpu")
    with pytest.raises(UserError, match=r"model_index\.json is missing"):
        open_backend(str(tmp_path), "cpu")
    copy = tmp_path / "copy"
    shutil.copytree(stable_diffusion, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        open_backend(str(copy), "cpu")
    weights.unlink()
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"code")  # a pickle is never read
    with pytest.raises(UserError, match="cannot be loaded"):
        open_backend(str(copy), "cpu")
    index = json.loads((copy / "model_index.json").read_text())
    for change, words in (
        ({"unet": ["diffusers", "UNet2DModel"]}, "unet is a UNet2DModel, expected a UNet2DConditionModel"),
        ({"_class_name": "FluxPipeline"}, "got a FluxPipeline"),
    ):
        (copy / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(UserError, match=words):
            open_backend(str(copy), "cpu")
