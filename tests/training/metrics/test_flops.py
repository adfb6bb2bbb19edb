"""FLOPs per step, compared with torch's counter during training and with known formulas."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cat_fast.generator.flops
import cat_fast.training.metrics.flops
from cat_fast.generator import DiT, PackedText
from cat_fast.packing import PackedSequence
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.discriminator import StyleGANDiscriminator
from cat_fast.tokenizer.losses import LossConfig, TokenizerObjective
from cat_fast.training.config.settings import DiscriminatorConfig, ImageDataConfig, TokenizerRun
from cat_fast.training.metrics.flops import DiTFlops, TokenizerFlops, token_count

MODEL = {
    "block_out_channels": [8, 8, 16, 16, 32, 32],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "mid_block_num_layers": 1,
    "mid_block_attention_head_dim": 32,
}


def tokenizer_flops(**loss) -> TokenizerFlops:
    config = TokenizerRun(
        task="tokenizer",
        output_dir="nowhere",
        model=MODEL,
        data=ImageDataConfig(image_size=64),
        loss=LossConfig(**loss),
        discriminator=DiscriminatorConfig(resolution=16, channel_base=128, channel_max=16),
    )
    return TokenizerFlops(config, TokenizerObjective(config.loss), StyleGANDiscriminator(16, 128, 16))


def counted(run) -> int:
    """Count the FLOPs of training on real tensors; torch does not count its fused CPU attention."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("ratio", [8, 16, 32])
def test_autoencoder_flops_equal_those_of_training(ratio, monkeypatch):
    monkeypatch.setenv("CAT_FAST_BACKEND", "reference")
    model = NestedAutoencoderKL(**MODEL)
    images = torch.zeros(2, 3, 64, 64)
    expected = counted(lambda: model(images, ratio).sample)
    assert tokenizer_flops(perceptual_weight=0).of(ratio, 2, False) == expected


@pytest.mark.parametrize("head_dim", [1, 8])
def test_products_that_scalar_attention_does_not_compute_do_not_count(head_dim, monkeypatch):
    """Heads of one dimension sum over tables; at 8x, 256 px have 1,024 positions."""
    config = TokenizerRun(
        task="tokenizer",
        output_dir="nowhere",
        model={**MODEL, "mid_block_attention_head_dim": head_dim},
        data=ImageDataConfig(image_size=256),
        loss=LossConfig(perceptual_weight=0),
        discriminator=DiscriminatorConfig(resolution=16, channel_base=128, channel_max=16),
    )
    objective = TokenizerObjective(config.loss)
    counted_flops = TokenizerFlops(config, objective, StyleGANDiscriminator(16, 128, 16))

    def count(nodes):
        monkeypatch.setattr(cat_fast.training.metrics.flops, "SCALAR_ATTENTION_NODES", nodes)
        return counted_flops._count(8, 1, False)

    naive, half, few = (count(nodes) for nodes in (10**9, 512, 64))
    if head_dim == 8:
        assert naive == half == few
    else:
        assert (naive - few) / (naive - half) == pytest.approx((1 - 64 / 1024) / (1 - 512 / 1024), rel=1e-6)


def test_ghost_pass_does_not_count():
    model = NestedAutoencoderKL(**MODEL)
    with_ghost = counted(lambda: model.reconstruct(torch.zeros(2, 3, 64, 64), 8, ghost_pass=True)[0])
    assert tokenizer_flops(perceptual_weight=0).of(8, 2, False) < with_ghost


def test_loss_networks_and_discriminator_count():
    plain, perceptual = tokenizer_flops(perceptual_weight=0), tokenizer_flops()
    network = TokenizerObjective(LossConfig()).distances[-1].network
    images = torch.zeros(2, 3, 64, 64)
    one = counted(lambda: network(images.clone().requires_grad_(), images))
    assert perceptual.of(16, 2, False) - plain.of(16, 2, False) == one

    discriminator = StyleGANDiscriminator(16, 128, 16)
    crops = torch.zeros(2, 3, 16, 16)
    own_step = counted(lambda: discriminator(torch.cat([crops, crops])))
    discriminator.requires_grad_(False)
    autoencoder_step = counted(lambda: discriminator(crops.clone().requires_grad_()))
    assert plain.of(16, 2, True) - plain.of(16, 2, False) == own_step + autoencoder_step


def test_flops_grow_with_the_batch_and_fall_with_the_ratio():
    counted_flops = tokenizer_flops()
    assert counted_flops.of(16, 6, True) == 3 * counted_flops.of(16, 2, True)
    assert counted_flops.of(8, 2, False) > counted_flops.of(16, 2, False) > counted_flops.of(32, 2, False)


def test_step_amounts_sum_over_batches():
    counted_flops = tokenizer_flops()
    assert counted_flops.step_amounts([(8, 3), (32, 2)], False) == {
        "images": 5,
        "tokens": 3 * 16 + 2 * 1,
        "flops": counted_flops.of(8, 3, False) + counted_flops.of(32, 2, False),
    }


@pytest.mark.parametrize(
    ("ratio", "side", "tokens"),
    [(8, 512, 1024), (16, 512, 256), (32, 512, 64), (32, 32, 0.25), (16, (48, 96), 4.5)],
)
def test_tokens_of_an_image(ratio, side, tokens):
    assert token_count(ratio, side) == tokens


def test_counting_uses_no_random_numbers():
    counted_flops = tokenizer_flops()
    before = torch.get_rng_state()
    counted_flops.of(16, 1, True)
    DiTFlops(DIT).of([16])
    assert torch.equal(before, torch.get_rng_state())


DIT = {"in_channels": 4, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 5}


def packed(sides: list[int]) -> PackedSequence:
    latents = [torch.zeros(4, side, side) for side in sides]
    return PackedSequence.from_latents(latents, [8] * len(sides), labels=[0] * len(sides))


@pytest.mark.parametrize("sides", [[8], [8, 8, 8], [4, 16, 8, 4]])
def test_transformer_flops_equal_those_of_training(sides, monkeypatch):
    monkeypatch.setenv("CAT_FAST_BACKEND", "reference")
    batch = packed(sides)
    model = DiT(**DIT)
    expected = counted(lambda: model(batch, torch.zeros(len(sides), dtype=torch.long)).sample)
    assert DiTFlops(DIT).of(batch.cu_seqlens.diff().tolist()) == expected


def test_text_tokens_count(monkeypatch):
    monkeypatch.setenv("CAT_FAST_BACKEND", "reference")
    arguments = DIT | {"text_dim": 6, "shared_adaln": True, "swiglu": True, "rope": True, "qk_norm": True}
    batch, model = packed([4, 16, 8]), DiT(**arguments)
    text = PackedText.of([torch.zeros(length, 6) for length in (3, 0, 7)])
    expected = counted(lambda: model(batch, torch.zeros(3, dtype=torch.long), text=text).sample)
    counts = DiTFlops(arguments)
    assert counts.of(batch.cu_seqlens.diff().tolist(), [3, 0, 7]) == expected
    assert counts.of([4]) < counts.of([4], [3])


@pytest.mark.parametrize("text_dim", [None, 6])
def test_counts_do_not_grow_with_the_variety_of_shapes(text_dim, monkeypatch):
    counts = []

    def counter(**options):
        counts.append(1)
        return FlopCounterMode(**options)

    for module in (cat_fast.generator.flops, cat_fast.training.metrics.flops):
        monkeypatch.setattr(module, "FlopCounterMode", counter)
    transformer = DiTFlops(DIT | {"text_dim": text_dim})
    found = {transformer.of([length], [length % 7]) for length in range(1, 200)}
    assert len(found) == 199
    assert len(counts) <= 3

    counts.clear()
    tokenizer = tokenizer_flops(perceptual_weight=0)
    for images in range(1, 100):
        tokenizer.of(16, images, False)
    assert len(counts) == 1


def test_transformer_flops_agree_with_the_formula():
    transformer, tokens, width, depth = DiTFlops(DIT), 64, 32, 3
    attention = 12 * tokens**2 * width  # QKᵀ and PV, two FLOPs each, times three for forward and backward
    linear = 6 * tokens * 12 * width**2  # qkv, proj and MLP
    modulation = 6 * 6 * width**2  # once per sequence
    blocks = depth * (attention + linear + modulation)
    assert transformer.of([tokens]) == pytest.approx(blocks, rel=0.1)
    assert transformer.sequence_flops(tokens)["attention"] == depth * attention
