"""Terms of the objectives against their formulas and the published networks."""

import importlib
import math
import pickle
import sys
import types

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch._subclasses.fake_tensor import FakeTensorMode

from cat_fast.errors import UserError
from cat_fast.tokenizer.adversarial import balance, non_saturating_discriminator
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator, random_crops
from cat_fast.tokenizer.features import ResNetFeatures
from cat_fast.tokenizer.losses import Distance, LossConfig, TokenizerObjective
from cat_fast.tokenizer.perceptual import STLPIPS


@pytest.fixture(scope="module")
def distance():
    return STLPIPS.pretrained()


@pytest.fixture
def published(monkeypatch):
    """The authors' network, with stubs for the notebook helpers that its module imports and never calls."""
    for name, attribute in (("IPython", "embed"), ("torchsummary", "summary")):
        module = types.ModuleType(name)
        setattr(module, attribute, None)
        monkeypatch.setitem(sys.modules, name, module)
    stlpips = importlib.import_module("stlpips_pytorch.stlpips")
    return stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)


def images(seed, batch=2, side=64):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_perceptual_distance_is_the_published_one(distance, published):
    x, y = images(0), images(1)
    with torch.no_grad():
        torch.testing.assert_close(
            distance(x, y), published(x.clone(), y.clone()).flatten(), rtol=1e-4, atol=1e-6
        )


def test_equal_images_have_distance_zero_and_a_finite_gradient(distance):
    x = images(0).requires_grad_()
    value = distance(x, x.detach())
    value.sum().backward()
    assert value.detach().abs().max() < 1e-6
    assert torch.isfinite(x.grad).all()


def test_more_blur_gives_a_larger_distance(distance):
    x = images(0)
    blurred = [torch.nn.functional.avg_pool2d(x, k, 1, k // 2, count_include_pad=False) for k in (3, 7, 15)]
    near, middle, far = (distance(b, x).mean().item() for b in blurred)
    assert 0 < near < middle < far


def test_the_perceptual_network_never_trains(distance):
    distance.train()
    assert not distance.training
    assert not any(p.requires_grad for p in distance.parameters())


def test_a_missing_weights_package_is_reported(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install stlpips-pytorch"):
        STLPIPS.pretrained()


@pytest.fixture
def posterior():
    torch.manual_seed(3)
    return DiagonalGaussianDistribution(torch.randn(2, 8, 4, 4))


def test_the_objective_adds_its_terms_with_their_weights(posterior):
    config = LossConfig(l1_weight=2.0, kl_weight=0.1, perceptual_weight=0.5, gan_weight=0.25)
    objective = TokenizerObjective(config)
    x, y = images(0), images(1)
    loss = objective(x, y, posterior, fake_logits=torch.tensor([0.3, -0.2]))
    raw = loss.raw
    assert set(raw) == set(loss.weighted) == {"l1", "kl", "st_lpips_alex", "gan"}
    torch.testing.assert_close(raw["l1"], (x - y).abs().mean())
    torch.testing.assert_close(raw["kl"], posterior.kl().mean())
    weights = {"l1": 2.0, "kl": 0.1, "st_lpips_alex": 0.5, "gan": 0.25}
    for name, weight in weights.items():
        torch.testing.assert_close(loss.weighted[name], weight * raw[name])
    torch.testing.assert_close(loss.total, sum(loss.weighted.values()))


def test_the_gan_starts_at_its_starting_step():
    objective = TokenizerObjective(LossConfig(gan_loss_starting_step=10))
    assert [objective.gan.active(step) for step in (0, 9, 10, 11)] == [False, False, True, True]
    assert not TokenizerObjective(LossConfig(gan_weight=0.0)).gan.active(10**6)


def test_an_adaptive_gan_weight_balances_the_gradients(posterior):
    objective = TokenizerObjective(LossConfig(gan_weight=0.5, adaptive_gan_weight=True))
    x, y = images(0), images(1).requires_grad_()
    fake_logits = 100 * y.mean((1, 2, 3))
    loss = objective(x, y, posterior, fake_logits)
    (together,) = torch.autograd.grad(loss.total, y)
    (without,) = torch.autograd.grad(objective(x, y, posterior).total, y)
    assert (together - without).norm().item() == pytest.approx(0.5 * without.norm().item(), rel=1e-2)


@pytest.mark.parametrize(("scale", "weight"), [(2.0, 0.5), (0.0, 1e4)])
def test_an_adaptive_weight_is_the_ratio_of_the_gradients_norms_up_to_a_limit(scale, weight):
    y = torch.ones(1, 3, 4, 4, requires_grad=True)
    found = balance(y.sum(), scale * y.sum(), y)
    assert found.item() == pytest.approx(weight, rel=1e-3)
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"perceptual": "vgg"}, "st_lpips_alex"),
        ({"gan_loss": "wasserstein"}, "hinge"),
        ({"kl_weight": -1.0}, "of at least 0, got -1.0"),
        ({"kl_weight": math.nan}, "kl_weight: expected a finite number .* got nan"),
        ({"gan_weight": math.inf}, "gan_weight: expected a finite number .* got inf"),
        ({"r1_every_steps": 0}, "at least 1"),
        ({"features_weight": 0.2}, "moco_v2_800ep_pretrain"),
    ],
)
def test_an_unknown_or_negative_setting_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        LossConfig(**arguments)


def test_the_discriminator_has_the_published_names_and_halves_down_to_four():
    model = StyleGANDiscriminator(resolution=32, channel_base=512, channel_max=32)
    names = set(model.state_dict())
    assert {
        "b32.fromrgb.weight",
        "b32.conv0.weight",
        "b16.conv1.bias",
        "b8.skip.weight",
        "b4.fc.weight",
    } <= names
    assert not any("b16.fromrgb" in name for name in names)
    assert model(images(0, side=32)).shape == (2,)


@torch.no_grad()
@pytest.mark.parametrize(
    ("resolution", "channel_base", "channel_max"),
    [
        (16, 64, 512),  # widths 4, 8 and, at 4 px, 16: the widest layer is in the epilogue
        (32, 100, 512),  # a base that the widths are not multiples of
        (32, 512, 8),
        (8, 32, 512),
        (64, 512, 24),
    ],
)
def test_a_published_discriminator_of_any_width_loads(tmp_path, resolution, channel_base, channel_max):
    torch.manual_seed(0)
    model = StyleGANDiscriminator(resolution, channel_base, channel_max)
    path = tmp_path / "network.pkl"
    path.write_bytes(pickle.dumps({"D": model}))
    x = images(0, side=resolution)
    assert torch.equal(StyleGANDiscriminator.from_pickle(path)(x), model(x))


def test_other_discriminators_are_refused(tmp_path):
    path = tmp_path / "network.pkl"
    for network, message in (
        (torch.nn.Linear(2, 2), "not a residual StyleGAN2 discriminator"),
        (StyleGANDiscriminator(16, 64).b16, "not a residual StyleGAN2 discriminator"),
    ):
        path.write_bytes(pickle.dumps({"D": network}))
        with pytest.raises(UserError, match=f"{path}: D is {message}"):
            StyleGANDiscriminator.from_pickle(path)
    model = StyleGANDiscriminator(16, 64)
    model.b16.fromrgb = torch.nn.Conv2d(1, 4, 1)
    path.write_bytes(pickle.dumps({"D": model}))
    with pytest.raises(UserError, match="fromrgb"):
        StyleGANDiscriminator.from_pickle(path)


def test_a_crops_logit_depends_on_that_crop_only():
    torch.manual_seed(0)
    model = StyleGANDiscriminator(resolution=16, channel_base=256, channel_max=16)
    x = images(0, batch=3, side=16)
    torch.testing.assert_close(
        model(x), torch.cat([model(x[i : i + 1]) for i in range(3)]), rtol=1e-4, atol=1e-5
    )


def test_the_discriminator_learns_to_separate_two_kinds_of_images():
    torch.manual_seed(0)
    model = StyleGANDiscriminator(resolution=16, channel_base=128, channel_max=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.0, 0.99))
    for step in range(40):
        real = images(step, batch=8, side=16)
        fake = torch.nn.functional.avg_pool2d(real, 5, 1, 2)
        loss = non_saturating_discriminator(*model(torch.cat([real, fake])).chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5  # chance is 2 log 2 = 1.39


def test_crops_of_several_batches_show_the_same_window():
    x = images(0, batch=4, side=48)
    first, second = random_crops([x, x * 2], 16)
    assert first.shape == (4, 3, 16, 16)
    torch.testing.assert_close(second, first * 2)
    assert random_crops([x], 48)[0] is x


@pytest.mark.parametrize(("side", "shape"), [(32, (32, 32)), (48, (48, 48)), (64, (48, 64)), (96, (48, 96))])
def test_windows_of_non_square_images_fit_the_smaller_side(side, shape):
    x = images(0, batch=3, side=96)[:, :, :48]
    for batch, expected in ((x, shape), (x.mT, shape[::-1])):
        (crops,) = random_crops([batch], side)
        assert crops.shape == (3, 3, *expected)
        windows = batch.unfold(2, expected[0], 1).unfold(3, expected[1], 1)  # (B, C, rows, columns, h, w)
        for own, crop in zip(windows, crops, strict=True):
            assert (own == crop[:, None, None]).all(dim=(0, 3, 4)).any(), "it is one window of the image"


@pytest.mark.parametrize(
    "build", [STLPIPS, lambda: ResNetFeatures(None, "resnet18")], ids=["stlpips", "resnet"]
)
def test_features_in_bf16_give_the_distance_and_the_gradient_of_fp32(build):
    torch.manual_seed(0)
    network = build().requires_grad_(False)
    results = []
    for half in (False, True):
        x = images(0).requires_grad_()
        value = Distance("features", network, 1.0, half=half)(images(1), x)
        assert value.dtype == torch.float32
        results.append((value.item(), *torch.autograd.grad(value, x)))
    (exact, exact_gradient), (close, gradient) = results
    assert close == pytest.approx(exact, rel=2e-2)
    assert close != exact
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), exact_gradient.flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    ("device", "precision", "half"),
    [("cuda", "bf16", True), ("cuda", "fp32", False), ("cpu", "bf16", False)],
)
def test_loss_networks_run_in_bf16_and_channels_last_on_gpus_only(device, precision, half, monkeypatch):
    """Fake CUDA tensors need no GPU."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    with FakeTensorMode():
        without = LossConfig(perceptual_weight=0.0)
        objective = TokenizerObjective(without, device, precision)
        with torch.device(device):
            objective.add_distance("features", ResNetFeatures(None, "resnet18"), 1.0)
        (distance,) = objective.distances
        inputs, outputs = [], []
        distance.network.register_forward_pre_hook(lambda _module, given: inputs.extend(given))
        for module in distance.network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda _module, _inputs, out: outputs.append(out))
        x = torch.empty(2, 3, 64, 64, device=device)
        value = distance(x, x)
    assert value.dtype == torch.float32
    assert {out.dtype for out in outputs} == {torch.bfloat16 if half else torch.float32}
    assert all(given.is_contiguous(memory_format=torch.channels_last) == half for given in inputs)


def test_the_discriminator_is_channels_last_on_gpus():
    with FakeTensorMode():
        with torch.device("cuda"):
            discriminator = StyleGANDiscriminator(64, 512, 32)
        inputs = []
        discriminator.b64.register_forward_pre_hook(lambda _module, given: inputs.extend(given))
        discriminator(torch.empty(2, 3, 64, 64, device="cuda"))
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in inputs] == [True]
