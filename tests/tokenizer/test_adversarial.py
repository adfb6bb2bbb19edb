"""The GAN's losses and penalties, against their formulas and other libraries."""

import pickle
import sys
import types

import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.tokenizer.adversarial import GAN_LOSSES, R1, LeCam
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator
from cat_fast.tokenizer.losses import DiscriminatorObjective, LossConfig

PENALTY = R1(weight=1.0, every_steps=1)
REAL, FAKE = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.5, -3.0, 1.5])


def test_the_standard_losses_are_binary_cross_entropy():
    autoencoder, discriminator = GAN_LOSSES["non_saturating"]
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = bce(REAL, torch.ones(3)) + bce(FAKE, torch.zeros(3))
    torch.testing.assert_close(discriminator(REAL, FAKE), expected)
    torch.testing.assert_close(autoencoder(FAKE), bce(FAKE, torch.ones(3)))


def test_the_hinge_losses_stop_at_a_margin_of_one():
    autoencoder, discriminator = GAN_LOSSES["hinge"]
    expected = (0 + 2 + 0.5) / 3 + (1.5 + 0 + 2.5) / 3
    assert discriminator(REAL, FAKE).item() == pytest.approx(expected)
    assert autoencoder(FAKE).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("loss", GAN_LOSSES)
def test_losses_of_half_precision_logits_are_float32(loss):
    autoencoder, discriminator = GAN_LOSSES[loss]
    assert autoencoder(FAKE.bfloat16()).dtype == torch.float32
    assert discriminator(REAL.bfloat16(), FAKE.bfloat16()).dtype == torch.float32


def test_r1_of_a_linear_discriminator_is_its_weight_squared():
    weight = torch.randn(3, 4, 4, requires_grad=True)
    penalty = PENALTY(lambda real: (real * weight).sum((1, 2, 3)), torch.randn(5, 3, 4, 4))
    torch.testing.assert_close(penalty, 0.5 * weight.square().sum())
    torch.testing.assert_close(torch.autograd.grad(penalty, weight)[0], weight)


def test_r1_has_gradients_at_the_discriminators_weights():
    torch.manual_seed(0)
    model = StyleGANDiscriminator(resolution=16, channel_base=128, channel_max=16).double()
    real = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    weight = model.b16.conv0.weight

    (gradient,) = torch.autograd.grad(PENALTY(model, real), weight)
    step = 1e-2
    with torch.no_grad():
        weight[0, 0, 0, 0] += step
    up = PENALTY(model, real).item()
    with torch.no_grad():
        weight[0, 0, 0, 0] -= 2 * step
    down = PENALTY(model, real).item()
    assert gradient[0, 0, 0, 0].item() == pytest.approx((up - down) / (2 * step), rel=1e-2)


def test_lecam_pulls_logits_to_the_other_sides_mean():
    lecam = LeCam(weight=1.0, decay=0.9)
    torch.testing.assert_close(lecam(REAL, FAKE), REAL.square().mean() + FAKE.square().mean())
    lecam.update(1.0, -2.0)
    expected = (REAL + 0.2).square().mean() + (FAKE - 0.1).square().mean()
    torch.testing.assert_close(lecam(REAL, FAKE), expected)
    again = LeCam(weight=1.0)
    again.load_state_dict(lecam.state_dict())
    assert (again.real, again.fake) == (lecam.real, lecam.fake)


def stylegan_pickle(path, networks):
    """Write a pickle like NVlabs', in which a function rebuilds modules from their source and state."""

    def reduce(module):
        return _reconstruct_persistent_obj, ({"type": "class", "state": dict(module.__dict__)},)

    class Pickler(pickle.Pickler):
        def reducer_override(self, value):
            return reduce(value) if isinstance(value, torch.nn.Module) else NotImplemented

    with path.open("wb") as file:
        Pickler(file).dump(networks)


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the reader ran the pickle's function")


@pytest.fixture
def persistence(monkeypatch):
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setattr(_reconstruct_persistent_obj, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@torch.no_grad()
@pytest.mark.usefixtures("persistence")
def test_a_published_discriminator_is_read_from_its_pickle(tmp_path):
    torch.manual_seed(0)
    theirs = StyleGANDiscriminator(resolution=32, channel_base=256, channel_max=24)
    theirs.b32.register_buffer("resample_filter", torch.ones(4, 4))  # NVlabs' blocks have one
    stylegan_pickle(tmp_path / "network.pkl", {"G": None, "D": theirs, "training_set_kwargs": {}})
    ours = StyleGANDiscriminator.from_pickle(tmp_path / "network.pkl")
    crops = torch.rand(2, 3, 32, 32)
    assert ours.resolution == 32
    torch.testing.assert_close(ours(crops), theirs(crops))


@pytest.mark.usefixtures("persistence")
def test_a_pickle_without_such_a_discriminator_is_refused(tmp_path):
    path = tmp_path / "network.pkl"
    stylegan_pickle(path, {"G": None})
    with pytest.raises(UserError, match="discriminator D is missing"):
        StyleGANDiscriminator.from_pickle(path)
    stylegan_pickle(path, {"D": torch.nn.Linear(2, 2)})
    with pytest.raises(UserError, match="not a residual StyleGAN2"):
        StyleGANDiscriminator.from_pickle(path)
    odd = StyleGANDiscriminator(resolution=16, channel_base=128, channel_max=16)
    odd.b4.fc = torch.nn.Linear(3, 2)
    stylegan_pickle(path, {"D": odd})
    with pytest.raises(UserError, match=r"b4.fc.weight is missing or has another shape"):
        StyleGANDiscriminator.from_pickle(path)


def test_the_discriminators_objective_adds_its_terms_with_their_weights():
    config = LossConfig(r1_weight=0.5, r1_every_steps=4, lecam_weight=0.1, gan_loss="hinge")
    objective = DiscriminatorObjective(config)
    objective.lecam.update(1.0, -1.0)
    weight = torch.randn(3, 4, 4, requires_grad=True)
    crops = torch.randn(3, 3, 4, 4)

    def judge(images):
        return (images * weight).sum((1, 2, 3))

    loss = objective(8, REAL, FAKE, judge, crops)
    expected = {"discriminator": 1.0, "r1": 4 * 0.5, "lecam": 0.1}
    assert loss.raw.keys() == expected.keys()
    torch.testing.assert_close(loss.raw["discriminator"], GAN_LOSSES["hinge"][1](REAL, FAKE))
    torch.testing.assert_close(loss.raw["r1"], 0.5 * weight.square().sum())
    torch.testing.assert_close(loss.raw["lecam"], objective.lecam(REAL, FAKE))
    for name, heavy in expected.items():
        torch.testing.assert_close(loss.terms()[f"weighted/{name}"], heavy * loss.raw[name])
    torch.testing.assert_close(loss.total, sum(loss.weighted.values()))
    assert objective(9, REAL, FAKE, judge, crops).raw.keys() == {"discriminator", "lecam"}
