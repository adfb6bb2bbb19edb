"""Tokenizers of an evaluation: ours, diffusers', and one-dimensional ones by stand-in packages."""

import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL

from cat_fast.complexity import RatioThresholds
from cat_fast.errors import UserError
from cat_fast.evaluation.tokenizers.columns import Scored, parse_columns
from cat_fast.evaluation.tokenizers.protocol import open_tokenizer
from tests.cli.conftest import tiny_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    tiny_tokenizer().save_pretrained(root / "ours")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    AutoencoderKL(block_out_channels=(8, 8, 8), norm_num_groups=4, **blocks).save_pretrained(root / "kl")
    kinds = ("ResBlock", "ResBlock")
    AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    ).save_pretrained(root / "dc")
    return root


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_ours_is_the_model_at_each_ratio(folders, images):
    found = open_tokenizer(str(folders / "ours"), "cpu")
    assert found.choices == (8, 16, 32)
    for ratio in found.choices:
        torch.testing.assert_close(found.reconstruct(images, ratio), found.model(images, ratio).sample)
        assert found.positions(ratio, 64) == (64 // ratio) ** 2
    assert found.flops(8, 128) == pytest.approx(4 * found.flops(8, 64), rel=0.1)
    assert found.flops(8, 64) != found.flops(32, 64)


@torch.no_grad()
@pytest.mark.parametrize(("name", "ratio", "kind"), [("kl", 4, "AutoencoderKL"), ("dc", 2, "AutoencoderDC")])
def test_diffusers_folders(folders, images, name, ratio, kind):
    found = open_tokenizer(str(folders / name), "cpu")
    assert found.choices == (ratio,)
    assert found.record()["class"] == kind
    encoded = found.model.encode(images)
    latent = encoded.latent_dist.mode() if name == "kl" else encoded.latent
    assert found.positions(ratio, 64) == latent.shape[2] * latent.shape[3]
    torch.testing.assert_close(found.reconstruct(images, ratio), found.model.decode(latent).sample)
    assert found.flops(ratio, 64) > 0
    again = open_tokenizer(str(folders / name), "cpu")
    assert again.record() == found.record()
    next(again.model.parameters()).add_(1)
    trained = open_tokenizer(str(folders / name), "cpu")
    trained.model.load_state_dict(again.model.state_dict())
    assert trained.record() != found.record(), "a resumed evaluation must not take them for the same"


class StandIn(torch.nn.Module):
    """FlexTok's and TiTok's interfaces: an image's mean colour in every token."""

    num_latent_tokens = 32

    @classmethod
    def from_pretrained(cls, folder):
        return cls()

    def tokenize(self, x):
        return [one.mean((1, 2))[None, :, None].expand(1, 3, 256).mean(1) for one in x]

    def detokenize(self, tokens, **options):
        self.lengths = [token.shape[1] for token in tokens]
        return torch.zeros(len(tokens), 3, 64, 64)

    def encode(self, x):
        assert x.min() >= 0
        return x, {"min_encoding_indices": x.mean((1, 2, 3))}

    def decode_tokens(self, indices):
        return indices[:, None, None, None].expand(-1, 3, 64, 64)


def test_one_dimensional_tokenizers(monkeypatch, tmp_path, images):
    monkeypatch.setitem(sys.modules, "flextok", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flextok.flextok_wrapper", SimpleNamespace(FlexTokFromHub=StandIn))
    monkeypatch.setitem(sys.modules, "modeling", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "modeling.titok", SimpleNamespace(TiTok=StandIn))
    flextok = open_tokenizer(f"flextok:{tmp_path}", "cpu")
    assert flextok.choices == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert flextok.reconstruct(images, 64).shape == images.shape
    assert flextok.model.lengths == [64, 64]
    titok = open_tokenizer(f"titok:{tmp_path}", "cpu")
    assert (titok.choices, titok.positions(32, 256), titok.flops(32, 256)) == ((32,), 32, None)
    expected = images.mean((1, 2, 3))[:, None, None, None].expand(-1, 3, 64, 64)
    torch.testing.assert_close(titok.reconstruct(images, 32), expected)


@pytest.mark.parametrize("kind", ["flextok", "titok"])
def test_missing_packages_and_weights_are_named(kind, tmp_path):
    with pytest.raises(UserError, match=f"{kind}: the package"):
        open_tokenizer(f"{kind}:{tmp_path}", "cpu")
    with pytest.raises(UserError, match="no such folder; expected the folder of"):
        open_tokenizer(f"{kind}:{tmp_path / 'missing'}", "cpu")


def test_rules_choose_ratios(folders):
    tokenizer = open_tokenizer(str(folders / "ours"), "cpu", "ours")
    scored = [Scored("a", 2, 2.2), Scored("b", 5, 5.1), Scored("c", 9, 8.7)]
    columns = parse_columns(
        tokenizer, ["adaptive", "8x", "equalized", "jpeg", "budget=16"], RatioThresholds(4, 7)
    )
    assert [column.name for column in columns][:2] == ["ours adaptive", "ours 8x"]
    assert [column.choose(scored, 128) for column in columns[:4]] == [
        [32, 16, 8], [8] * 3, [16] * 3, [None] * 3,
    ]  # fmt: skip
    chosen = columns[4].choose(scored, 128)
    assert sum((128 // ratio // 2) ** 2 for ratio in chosen) <= 16 * 3
    assert chosen[0] >= chosen[1] >= chosen[2]
    assert [column.rule for column in parse_columns(tokenizer, [])] == ["8", "16", "32"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["best"], "ratio 'best': expected adaptive"),
        (["4"], "needs 4, but the tokenizer has 8, 16, 32"),
        (["budget=x"], "expected adaptive"),
    ],
)
def test_unknown_rules_are_refused(folders, rules, message):
    with pytest.raises(UserError, match=message):
        parse_columns(open_tokenizer(str(folders / "ours"), "cpu"), rules)


def test_a_fixed_tokenizer_has_no_adaptive_column(folders):
    with pytest.raises(UserError, match="the rule 'adaptive' needs 8"):
        parse_columns(open_tokenizer(str(folders / "kl"), "cpu"), ["adaptive"])
