"""Feature networks of the real architecture, with random weights, against other implementations."""

import json

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.models import vgg16

from cat_fast.data.images.io import image_to_bytes, load_image, resize_center_crop
from cat_fast.data.photographs import photographs
from cat_fast.errors import UserError
from cat_fast.evaluation.features.inception import InceptionV3
from cat_fast.evaluation.features.loading import load_network
from cat_fast.evaluation.features.network import normalise
from cat_fast.evaluation.features.resize import resize_bilinear_tf1


@pytest.fixture(scope="module")
def images():
    found = [resize_center_crop(load_image(p.path), 96) for p in photographs("held_out")[:2]]
    return torch.stack(list(map(image_to_bytes, found)))


def random_inception():
    """Random weights whose activations neither vanish nor explode, unlike those of default initialisation."""
    torch.manual_seed(0)
    network = InceptionV3()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return network


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    state = random_inception().state_dict()
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file):
    return load_network("inception", inception_file)


@pytest.mark.parametrize(("side", "out"), [(96, 299), (512, 299), (40, 224)])
def test_resize_is_that_of_tensorflow_1(side, out):
    x = torch.rand(1, 2, side, side + 9, generator=torch.Generator().manual_seed(0)) * 255
    expected = interpolate_bilinear_2d_like_tensorflow1x(x, size=(out, out), align_corners=False)
    torch.testing.assert_close(resize_bilinear_tf1(x, out), expected)


def test_inception_equals_torch_fidelity(inception, inception_file, images, tmp_path):
    complete = tmp_path / "complete.pth"  # torch-fidelity is strict about batch counters
    torch.save(inception.network.state_dict(), complete)
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(complete)
    )
    pool, logits = theirs(images)
    found = inception.network(images)
    assert {name: value.shape[1] for name, value in found.items()} == inception.network.sizes
    torch.testing.assert_close(found["pool"], pool, rtol=1e-4, atol=1e-4 * pool.abs().max().item())
    torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())
    assert pool.std() > 0.01, "the features must depend on the images"


def test_spatial_features_are_the_layer_of_adm(inception, images):
    """By a hook on torch-fidelity's block of the same weights: channel 0..6, rows first, channels last."""
    caught = []
    block = inception.network.Mixed_6d.branch1x1
    hook = block.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    found = inception.network(images)["spatial"]
    hook.remove()
    (layer,) = caught
    assert layer.shape[1:] == (192, 17, 17)
    assert (layer >= 0).all(), "after the ReLU"
    assert found.shape == (2, 2023)
    for row, column, channel in ((0, 0, 0), (3, 5, 6), (16, 16, 2)):
        assert torch.equal(found[:, (row * 17 + column) * 7 + channel], layer[:, channel, row, column])


def test_weights_are_recorded_and_their_figures_named(inception, inception_file):
    record = inception.record()
    assert record["file"] == inception_file.name
    assert inception.prefix == f"custom-{record['sha256'][:8]}-"
    proxy = load_network("proxy")
    assert (proxy.prefix, proxy.suffix) == ("proxy-", "-vgg16")


def test_weights_of_another_network_are_refused(tmp_path, inception_file):
    other = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(2)}, other)
    with pytest.raises(UserError, match="is missing from its weights"):
        load_network("inception", other)
    state = torch.load(inception_file, weights_only=True)
    state["fc.weight"] = state["fc.weight"][:1000]
    torch.save(state, other)
    with pytest.raises(UserError, match=r"fc\.weight has shape \(1000, 2048\), expected \(1008, 2048\)"):
        load_network("inception", other)
    with pytest.raises(UserError, match=r"features 'clip': expected inception"):
        load_network("clip")


@pytest.mark.parametrize("name", ["inception", "vgg16", "dinov2"])
def test_missing_weights_say_what_to_put_where(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(UserError, match=rf"missing.*(put|pass).*--weights {name}="):
        load_network(name)


def test_vgg16_equals_torch_fidelity(images, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "vgg16.pth"
    torch.save(vgg16(weights=None).state_dict(), path)
    theirs = FeatureExtractorVGG16("vgg16", ["fc2_relu"], feature_extractor_weights_path=str(path))
    found = load_network("vgg16", path).network(images)["pool"]
    (expected,) = theirs(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_proxy_is_the_network_of_its_package(images):
    """Against the published state dict, applied by hand with plain convolutions and the published filters."""
    loaded = load_network("proxy")
    state = torch.load(loaded.file, map_location="cpu", weights_only=True)
    x = normalise(images.float())
    for name in (key for key in state if key.startswith("net.") and not key.endswith("bias")):
        if name.endswith("filt"):
            x = torch.nn.functional.max_pool2d(x, 2, stride=1)
            x = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
            x = torch.nn.functional.conv2d(x, state[name], stride=2, groups=x.shape[1])
        else:
            bias = state[name.replace("weight", "bias")]
            x = torch.nn.functional.conv2d(x, state[name], bias, padding=1).relu()
    torch.testing.assert_close(loaded.network(images)["pool"], x.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_dinov2_is_the_normalised_class_token(images, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    loaded = load_network("dinov2", tmp_path)
    assert loaded.prefix.startswith("custom-")
    found = loaded.network(images)["pool"]
    processor = transformers.BitImageProcessor(
        size={"height": 224, "width": 224}, do_center_crop=False, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    inputs = processor(list(images), return_tensors="pt")
    with torch.no_grad():
        token = model(**inputs).last_hidden_state[:, 0]
    torch.testing.assert_close(found, token, rtol=2e-2, atol=2e-2)  # torchvision's bicubic filter differs
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2", "hidden_size": 32}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_network("dinov2", tmp_path)
