"""LPIPS by file against the `lpips` package with the same trunk."""

import lpips
import pytest
import torch
from torchvision.models import vgg16

from cat_fast.errors import UserError
from cat_fast.evaluation.features.perceptual import load_perceptual
from cat_fast.tokenizer.perceptual import STLPIPS


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A VGG-16 with random weights; only its convolutions matter."""
    torch.manual_seed(0)
    state = vgg16(weights=None, init_weights=False).features.state_dict()
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({f"features.{name}": value for name, value in state.items()}, path)
    return path


def test_lpips_equals_the_package(file):
    theirs = lpips.LPIPS(net="vgg", verbose=False, pnet_rand=True)
    state = torch.load(file, weights_only=True)
    for number, (name, value) in enumerate(theirs.net.named_parameters()):
        assert value.shape == list(state.values())[number].shape
        value.data.copy_(state["features." + name.split(".", 1)[1]])
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.rand(2, 3, 64, 64, generator=draw) * 2 - 1 for _ in range(2))
    found = load_perceptual(False, file)
    with torch.no_grad():
        expected = theirs(x, y).flatten()
    torch.testing.assert_close(found.network(x, y), expected, rtol=1e-4, atol=1e-6)
    assert found.network(x, x).abs().max() < 1e-6
    assert found.name == f"custom-{found.record['sha256'][:8]}-lpips_vgg"


def test_missing_or_other_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"put torchvision's vgg16-397923af.pth there"):
        load_perceptual(False)
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(UserError, match="is missing from its weights"):
        load_perceptual(False, tmp_path / "part.pth")
    assert load_perceptual(True).name == STLPIPS.name
