"""Published autoencoders load, from folders and single files, and code in a checkpoint is never run."""

import os
import pickle
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from cat_fast import NestedAutoencoderKL
from cat_fast.errors import UserError
from cat_fast.tokenizer.pretrained import diffusers_name
from cat_fast.weights.tensor_pickle import load_checkpoint, load_pickle, module_state
from tests.tokenizer.test_autoencoder import perturbed


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"scaling_factor": 0.25, "shift_factor": 0.1},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {
            "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        },
    ],
    ids=["plain", "without quant_conv", "attention in a block"],
)
def test_a_diffusers_folder_gives_diffusers_outputs(tmp_path, options):
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 16, 32),
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 8,
    }
    theirs = perturbed(AutoencoderKL(**blocks | options))
    theirs.save_pretrained(tmp_path / "vae")
    ours = NestedAutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    assert ours.ratios == (4,)
    assert not ours.training
    assert ours.config.scaling_factor == theirs.config.scaling_factor
    assert ours.config.shift_factor == (theirs.config.shift_factor or 0.0)
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    posterior, expected = ours.encode(image, 4).latent_dist, theirs.encode(image).latent_dist
    close(posterior.mean, expected.mean)
    close(posterior.logvar, expected.logvar)
    close(ours.decode(posterior.mode(), 4).sample, theirs.decode(expected.mode()).sample)


def test_an_unsupported_diffusers_model_is_refused(tmp_path):
    AutoencoderKL(block_out_channels=(32,), mid_block_add_attention=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="mid block without attention"):
        NestedAutoencoderKL.from_pretrained(tmp_path)


class LDM:
    """Reference LDM autoencoder, as a function of its state dict."""

    def __init__(self, ch_mult, attention_levels, latent_channels=4, width=32, layers=2):
        self.state, self.levels = {}, range(len(ch_mult))
        generator = torch.Generator().manual_seed(0)

        def conv(name, inputs, outputs, size):
            scale = (inputs * size**2) ** -0.5
            self.state[f"{name}.weight"] = (
                torch.randn(outputs, inputs, size, size, generator=generator) * scale
            )
            self.state[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.1

        def norm(name, channels):
            self.state[f"{name}.weight"] = 1 + 0.1 * torch.randn(channels, generator=generator)
            self.state[f"{name}.bias"] = 0.1 * torch.randn(channels, generator=generator)

        def block(name, inputs, outputs):
            norm(f"{name}.norm1", inputs)
            conv(f"{name}.conv1", inputs, outputs, 3)
            norm(f"{name}.norm2", outputs)
            conv(f"{name}.conv2", outputs, outputs, 3)
            if inputs != outputs:
                conv(f"{name}.nin_shortcut", inputs, outputs, 1)

        def attention(name, channels):
            norm(f"{name}.norm", channels)
            for part in ("q", "k", "v", "proj_out"):
                conv(f"{name}.{part}", channels, channels, 1)

        def mid(half, channels):
            block(f"{half}.mid.block_1", channels, channels)
            attention(f"{half}.mid.attn_1", channels)
            block(f"{half}.mid.block_2", channels, channels)

        widths = [width * m for m in ch_mult]
        conv("encoder.conv_in", 3, width, 3)
        current = width
        for level in self.levels:
            for j in range(layers):
                block(f"encoder.down.{level}.block.{j}", current, widths[level])
                current = widths[level]
                if level in attention_levels:
                    attention(f"encoder.down.{level}.attn.{j}", current)
            if level < len(widths) - 1:
                conv(f"encoder.down.{level}.downsample.conv", current, current, 3)
        mid("encoder", current)
        norm("encoder.norm_out", current)
        conv("encoder.conv_out", current, 2 * latent_channels, 3)
        conv("quant_conv", 2 * latent_channels, 2 * latent_channels, 1)
        conv("post_quant_conv", latent_channels, latent_channels, 1)
        conv("decoder.conv_in", latent_channels, current, 3)
        mid("decoder", current)
        for level in reversed(self.levels):
            for j in range(layers + 1):
                block(f"decoder.up.{level}.block.{j}", current, widths[level])
                current = widths[level]
                if level in attention_levels:
                    attention(f"decoder.up.{level}.attn.{j}", current)
            if level > 0:
                conv(f"decoder.up.{level}.upsample.conv", current, current, 3)
        norm("decoder.norm_out", current)
        conv("decoder.conv_out", current, 3, 3)

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        shortcut = f"{name}.nin_shortcut"
        return h + (self.conv(shortcut, x) if f"{shortcut}.weight" in self.state else x)

    def attention(self, name, x):
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x))

    def layers(self, name, x):
        j = 0
        while f"{name}.block.{j}.conv1.weight" in self.state:
            x = self.block(f"{name}.block.{j}", x)
            if f"{name}.attn.{j}.q.weight" in self.state:
                x = self.attention(f"{name}.attn.{j}", x)
            j += 1
        return x

    def mid(self, half, x):
        x = self.attention(f"{half}.mid.attn_1", self.block(f"{half}.mid.block_1", x))
        return self.block(f"{half}.mid.block_2", x)

    def encode(self, x):
        x = self.conv("encoder.conv_in", x, padding=1)
        for level in self.levels:
            x = self.layers(f"encoder.down.{level}", x)
            if level < len(self.levels) - 1:
                x = self.conv(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = F.silu(self.norm("encoder.norm_out", self.mid("encoder", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x, padding=1))

    def decode(self, z):
        x = self.mid("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1))
        for level in reversed(self.levels):
            x = self.layers(f"decoder.up.{level}", x)
            if level > 0:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"decoder.up.{level}.upsample.conv", x, padding=1)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), padding=1)


class Intruder:
    """Object whose pickle runs a command when a plain reader loads it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@torch.no_grad()
@pytest.mark.parametrize(
    ("ch_mult", "attention_levels", "prefix"),
    [((1, 2, 2), (), ""), ((1, 1, 2, 2), (2, 3), "first_stage_model.")],
    ids=["as f8", "as f32, in a whole model"],
)
def test_an_ldm_checkpoint_gives_ldm_outputs_and_its_code_is_not_run(
    tmp_path, ch_mult, attention_levels, prefix
):
    theirs, marker = LDM(ch_mult, attention_levels), tmp_path / "intruded"
    state = {prefix + name: value for name, value in theirs.state.items()}
    state |= {"loss.logvar": torch.zeros(()), "scale_factor": torch.tensor(0.5)}
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state, "callbacks": {"intruder": Intruder(marker)}, "epoch": 3}, path)

    ours = NestedAutoencoderKL.from_single_file(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # a plain reader does run it, so the check is meaningful
    assert marker.exists()

    ratio = 2 ** (len(ch_mult) - 1)
    assert ours.ratios == (ratio,)
    assert ours.config.scaling_factor == 0.5
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    mean, logvar = theirs.encode(image).chunk(2, dim=1)
    posterior = ours.encode(image, ratio).latent_dist
    close(posterior.mean, mean)
    close(posterior.logvar, logvar)
    close(ours.decode(mean, ratio).sample, theirs.decode(mean))


def test_ldm_names_become_diffusers_names():
    assert diffusers_name("decoder.up.0.block.2.nin_shortcut.bias", 4) == (
        "decoder.up_blocks.3.resnets.2.conv_shortcut.bias"
    )
    assert diffusers_name("encoder.mid.attn_1.norm.weight", 4) == (
        "encoder.mid_block.attentions.0.group_norm.weight"
    )
    assert diffusers_name("encoder.down.1.downsample.conv.weight", 4) == (
        "encoder.down_blocks.1.downsamplers.0.conv.weight"
    )


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "no such file"),
        (b"not a checkpoint", "not a PyTorch checkpoint"),
        ({"state_dict": {}}, "no KL autoencoder"),
        ({"encoder.down_blocks.0.resnets.0.norm1.weight": torch.ones(8)}, "from_pretrained"),
        (
            {name: value for name, value in LDM((1, 2), ()).state.items() if "norm2" not in name},
            r"norm2\S* is missing from its weights, and \d+ more",
        ),
        (LDM((1, 2), (), latent_channels=3).state | {"quant_conv.weight": torch.ones(3, 3, 1, 1)}, "only KL"),
    ],
)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_file_without_an_autoencoder_is_refused(tmp_path, contents, message, suffix):
    path = tmp_path / f"model{suffix}"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
        message = message if suffix == ".ckpt" else "not a valid safetensors file"
    elif contents is not None and suffix == ".safetensors":
        save_file(
            {name: value.contiguous() for name, value in contents.items() if name != "state_dict"}, path
        )
    elif contents is not None:
        torch.save(contents, path)
    with pytest.raises(UserError, match=message) as failure:
        NestedAutoencoderKL.from_single_file(path)
    assert str(path) in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("https://example.org/model.safetensors", {}, "links are not supported"),
        (".", {}, "from_pretrained"),
        ("model.ckpt", {"original_config": "v1.yaml"}, "unexpected argument 'original_config'"),
    ],
)
def test_from_single_file_refuses_unsupported_arguments(source, options, message):
    with pytest.raises(UserError, match=message):
        NestedAutoencoderKL.from_single_file(source, **options)


def rename_attention(state, names):
    """Return a state with other attention: `names` maps q, k, v and proj_out, or leaves them out."""
    changed = {}
    for key, value in state.items():
        match = re.search(r"\.(norm|q|k|v|proj_out)\.(?:weight|bias)$", key) if ".attn" in key else None
        if match is None or match[1] in names:
            changed[key.replace(f".{match[1]}.", f".{names[match[1]]}.") if match else key] = value
    return changed


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"q": "to_qkv", "proj_out": "to_out"}, "linear attention is not supported"),
        ({}, r"a mid block without attention is not supported \(encoder\.mid\.attn_1\.q\.weight is missing"),
        ({"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}, "this attention is not supported"),
    ],
    ids=["linear", "none", "cross-attention"],
)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_other_attention_of_ldm_is_refused_in_one_line(tmp_path, names, message, suffix):
    state = rename_attention(LDM((1, 2), (1,)).state, names)
    path = tmp_path / f"model{suffix}"
    torch.save({"state_dict": state}, path) if suffix == ".ckpt" else save_file(state, path)
    with pytest.raises(UserError, match=f"{path}: {message}.*attn_type: vanilla") as caught:
        NestedAutoencoderKL.from_single_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder.extra.weight": torch.zeros(1)},
            r"contain encoder\.extra\.weight, which the model does not have",
        ),
        (
            {"encoder.conv_in.bias": torch.zeros(3)},
            r"encoder\.conv_in\.bias has shape \(3,\), expected \(32,\)",
        ),
    ],
)
def test_extra_and_mismatched_weights_of_ldm_are_refused(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        NestedAutoencoderKL.from_single_file(LDM((1, 2), ()).state | changes)
    assert "\n" not in str(caught.value)


def test_an_ldm_with_one_level_is_refused():
    with pytest.raises(UserError, match="an autoencoder with one level, of 32 channels, does not downsample"):
        NestedAutoencoderKL.from_single_file(LDM((1,), ()).state)


@torch.no_grad()
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "module.first_stage_model."]
)
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".safetensors"])
def test_files_of_all_kinds_with_prefixes_of_wrapper_modules_load(tmp_path, prefix, suffix):
    theirs = LDM((1, 2), ())
    state = {prefix + name: value for name, value in theirs.state.items()}
    path = tmp_path / f"vae{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = NestedAutoencoderKL.from_single_file(path, local_files_only=True, token=None)
    x = torch.rand(1, 3, 16, 16)
    close(model.encode(x).latent_dist.mean, theirs.encode(x).chunk(2, dim=1)[0])


def test_from_pretrained_refers_single_files_to_from_single_file(tmp_path):
    with pytest.raises(UserError, match="from_single_file"):
        NestedAutoencoderKL.from_pretrained(tmp_path / "model.safetensors")


@torch.no_grad()
def test_a_state_dict_and_both_kinds_of_file_give_the_same_model(tmp_path):
    state = {f"first_stage_model.{name}": value for name, value in LDM((1, 2), ()).state.items()}
    state["model.diffusion_model.out.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.ckpt")
    x = torch.rand(1, 3, 16, 16)
    outputs = []
    for source in (state, tmp_path / "model.safetensors", str(tmp_path / "model.ckpt")):
        model = NestedAutoencoderKL.from_single_file(source, scaling_factor=0.18215, force_upcast=False)
        assert model.config.scaling_factor == 0.18215
        assert not model.config.force_upcast
        outputs.append(model(x).sample)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@torch.no_grad()
def test_a_file_without_quant_convs_gets_identities():
    """Files of Flux and Stable Diffusion 3 lack these layers."""
    theirs = LDM((1, 2), ())
    state = {name: value for name, value in theirs.state.items() if "quant_conv" not in name}
    model = NestedAutoencoderKL.from_single_file(state, torch_dtype=torch.float64)
    assert model.dtype == torch.float64
    for name, width in (("quant_conv", 8), ("post_quant_conv", 4)):
        layer = model.get_submodule(name)
        assert torch.equal(layer.weight[:, :, 0, 0], torch.eye(width, dtype=torch.float64))
        assert not layer.bias.any()


def test_a_module_pickled_with_its_class_is_read_for_its_tensors(tmp_path, monkeypatch):
    """StyleGAN's networks are such pickles: they name a function that rebuilds the class from its source."""
    persistence = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the reader ran the pickle's function")

    _reconstruct_persistent_obj.__module__ = persistence.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, persistence.__name__, persistence)

    class Persistent(torch.nn.Linear):
        def __reduce__(self):
            return _reconstruct_persistent_obj, ({"class_name": "Linear", "state": self.__dict__},)

    network = Persistent(2, 3)
    network.add_module("plain", torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    path = tmp_path / "network.pkl"
    path.write_bytes(pickle.dumps({"D": network}))
    state = module_state(load_pickle(path)["D"])
    expected = network.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("load", [load_pickle, load_checkpoint])
def test_a_damaged_file_is_one_line(tmp_path, load):
    path = tmp_path / "damaged"
    path.write_bytes(pickle.dumps({"a": 1})[:-3])
    with pytest.raises(UserError, match=str(path)) as failure:
        load(path)
    assert "\n" not in str(failure.value)
