"""Feature distances with MoCo's checkpoint layout, other trunks and LPIPS, and errors about their weights."""

import lpips
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet18, squeezenet1_1

from cat_fast.errors import UserError
from cat_fast.tokenizer.features import ResNetFeatures
from cat_fast.tokenizer.perceptual import perceptual_distance

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def images(seed):
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def trunk():
    torch.manual_seed(0)
    return resnet18().eval()


def by_hand(trunk, x, y):
    total = torch.zeros(x.shape[0])
    stages = [((p + 1) / 2 - MEAN) / STD for p in (x, y)]
    stages = [trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(h)))) for h in stages]
    for layer in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
        stages = [layer(h) for h in stages]
        a, b = (F.normalize(h, dim=1) for h in stages)
        total = total + (a - b).square().sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize("prefix", ["", "module.encoder_q."], ids=["plain", "as MoCo saves it"])
def test_features_are_those_of_the_trunk(tmp_path, trunk, prefix):
    state = {prefix + name: value for name, value in trunk.state_dict().items()}
    if prefix:
        state |= {"module.queue": torch.zeros(3), "module.encoder_k.conv1.weight": torch.zeros(1)}
    path = tmp_path / "weights.pth.tar"
    torch.save({"epoch": 800, "arch": "resnet18", "state_dict": state}, path)
    features = ResNetFeatures(path, "resnet18")
    x, y = images(0).requires_grad_(), images(1).requires_grad_()
    distance = features(x, y)
    torch.testing.assert_close(distance, by_hand(trunk, x, y), rtol=1e-4, atol=1e-5)
    distance.sum().backward()
    assert x.grad.abs().sum() > 0
    assert y.grad is None
    assert not any(p.requires_grad for p in features.parameters())
    assert not features.train().training
    assert features(y, y).abs().max() == 0


def test_a_wrong_trunk_or_file_is_refused(tmp_path, trunk):
    path = tmp_path / "weights.pth"
    with pytest.raises(UserError, match="no such file"):
        ResNetFeatures(path, "resnet18")
    torch.save(trunk.state_dict(), path)
    with pytest.raises(
        UserError, match=r"not the weights of a resnet50: layer1.0.conv1.weight is missing or"
    ):
        ResNetFeatures(path, "resnet50")
    with pytest.raises(UserError, match="features_trunk: resnet19"):
        ResNetFeatures(path, "resnet19")
    with pytest.raises(UserError, match="expected a ResNet with layer1"):
        ResNetFeatures(path, "squeezenet1_1")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Empty cache of torch.hub, without network access."""
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def no_network(*_, **__):
        raise OSError("the network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return folder


def test_lpips_is_that_of_the_package(hub):
    torch.manual_seed(0)
    torch.save(squeezenet1_1().state_dict(), hub / "squeezenet1_1-b8a52dc0.pth")
    name, distance = perceptual_distance("lpips_squeeze")
    assert name == "lpips_squeeze"
    expected = lpips.LPIPS(net="squeeze", verbose=False)(images(0), images(1)).flatten()
    torch.testing.assert_close(distance(images(0), images(1)), expected)
    assert not any(p.requires_grad for p in distance.parameters())
    assert not distance.train().training


def test_a_missing_trunk_is_refused_and_auto_selects_the_available_one(hub):
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth is not in .*network is unreachable"):
        perceptual_distance("lpips_vgg")
    assert perceptual_distance("auto")[0] == "st_lpips_alex"
