"""DiT: packed images do not affect each other, and layers and layout are the original's."""

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from cat_fast.errors import UserError
from cat_fast.generator import DiT
from cat_fast.generator.embeddings import image_positions, position_embedding
from cat_fast.packing import PackedSequence


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def output_and_gradients(model, packs, weights):
    """Return the outputs of `packs`, and the gradients of sum(output * weight) for tokens and parameters."""
    model.zero_grad()
    outputs, inputs = [], []
    for packed, weight in zip(packs, weights, strict=True):
        tokens = packed.tokens.clone().requires_grad_()
        output = model(packed.replace(tokens=tokens)).sample
        (output * weight).sum().backward()
        outputs.append(output.detach())
        inputs.append(tokens.grad)
    parameters = {name: p.grad.clone() for name, p in model.named_parameters()}
    return torch.cat(outputs), torch.cat(inputs), parameters


@pytest.mark.parametrize("seed", range(4))
def test_packed_equals_each_image_alone(tiny_dit, random_mix, seed):
    packed = random_mix(seed)
    weight = torch.randn(packed.tokens.shape)
    alone_packs = packed.split()
    alone_weights = weight.split([part.num_tokens for part in alone_packs])

    together = output_and_gradients(tiny_dit, [packed], [weight])
    alone = output_and_gradients(tiny_dit, alone_packs, alone_weights)

    assert relative_error(together[0], alone[0]) <= 1e-5
    assert relative_error(together[1], alone[1]) <= 1e-5
    for name, gradient in alone[2].items():
        assert relative_error(together[2][name], gradient) <= 1e-5, name


def test_an_image_is_independent_of_its_neighbours_and_its_place(tiny_dit, random_mix):
    first, *others = random_mix(seed=5, count=5).split()
    expected = tiny_dit(first).sample
    last = PackedSequence.concat([*others, first])
    assert relative_error(tiny_dit(last).sample[-first.num_tokens :], expected) <= 1e-5
    loud = [other.replace(tokens=other.tokens * 100) for other in others]
    before = PackedSequence.concat([first, *loud])
    assert relative_error(tiny_dit(before).sample[: first.num_tokens], expected) <= 1e-5


def test_timestep_label_and_ratio_change_the_output(tiny_dit, random_mix):
    packed = random_mix(seed=1, count=1)
    base = tiny_dit(packed).sample
    for change in (
        {"timestep": packed.timestep + 1},
        {"label": (packed.label + 1) % 10},
        {"ratio": torch.where(packed.ratio == 8, 16, 8).int()},
    ):
        assert relative_error(tiny_dit(packed.replace(**change)).sample, base) > 1e-4, change


def test_a_fresh_model_predicts_zero_and_ignores_the_ratio():
    torch.manual_seed(0)
    model = DiT(in_channels=4, hidden_size=48, depth=1, num_heads=2, num_classes=10)
    packed = PackedSequence.from_latents([torch.randn(4, 8, 8)], [16], labels=[0])
    assert not model(packed, torch.tensor([500])).sample.any()
    assert not model.ratio_embedder.embedding_table.weight.any()


def test_grids_of_all_ratios_share_one_coordinate_frame():
    packed = PackedSequence.from_latents([torch.zeros(1, 16, 16), torch.zeros(1, 4, 4)], [8, 32])
    fine, coarse = image_positions(packed, frame=8).split([64, 4])
    assert torch.equal(fine.view(8, 8, 2)[3, 5], torch.tensor([3.0, 5.0]))
    centres_of_quarters = fine.view(2, 4, 2, 4, 2).mean((1, 3)).view(4, 2)
    assert torch.equal(coarse, centres_of_quarters)


def test_a_wide_image_keeps_its_aspect_ratio_in_the_frame():
    packed = PackedSequence.from_latents([torch.zeros(1, 4, 8)], [16])
    y, x = image_positions(packed, frame=8).unbind(1)
    assert x.unique().tolist() == [0.5, 2.5, 4.5, 6.5]
    assert y.unique().tolist() == [2.5, 4.5]


def test_positions_on_a_full_square_grid_equal_the_original_dit():
    packed = PackedSequence.from_latents([torch.zeros(1, 16, 16)], [8])
    expected = get_2d_sincos_pos_embed(48, grid_size=8, base_size=8, output_type="pt")
    torch.testing.assert_close(
        position_embedding(image_positions(packed, frame=8), 48), expected.float(), atol=2e-6, rtol=0
    )


def test_the_patch_embedding_is_the_strided_convolution(tiny_dit):
    latent = torch.randn(4, 8, 6)
    tokens = PackedSequence.from_latents([latent], [16]).tokens
    proj = tiny_dit.x_embedder.proj
    expected = torch.nn.functional.conv2d(latent[None], proj.weight, proj.bias, stride=2)
    torch.testing.assert_close(tiny_dit.x_embedder(tokens), expected[0].flatten(1).T)


def test_state_dict_has_the_published_layout(tiny_dit):
    """Names and shapes of facebookresearch/DiT, which also stores positions but has no ratio embedding."""
    block = {
        "attn.qkv": (144, 48), "attn.proj": (48, 48), "mlp.fc1": (192, 48), "mlp.fc2": (48, 192),
        "adaLN_modulation.1": (288, 48),
    }  # fmt: skip
    linears = {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()} | {
        "x_embedder.proj": (48, 4, 2, 2),
        "t_embedder.mlp.0": (48, 256),
        "t_embedder.mlp.2": (48, 48),
        "final_layer.linear": (16, 48),
        "final_layer.adaLN_modulation.1": (96, 48),
    }
    expected = {f"{name}.weight": shape for name, shape in linears.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    expected |= {
        "y_embedder.embedding_table.weight": (11, 48),
        "ratio_embedder.embedding_table.weight": (3, 48),
    }
    assert {name: tuple(value.shape) for name, value in tiny_dit.state_dict().items()} == expected


def test_label_dropout_is_active_in_training_only_and_seeded(tiny_dit, random_mix):
    packed = random_mix(seed=2, count=1)
    packed = PackedSequence.concat([packed] * 400)
    null = tiny_dit(packed.replace(label=torch.full_like(packed.label, 10))).sample[0]
    labelled = tiny_dit(packed).sample[0]
    assert relative_error(null, labelled) > 1e-3

    tiny_dit.train()
    first = tiny_dit(packed, generator=torch.Generator().manual_seed(7)).sample.detach()
    again = tiny_dit(packed, generator=torch.Generator().manual_seed(7)).sample.detach()
    assert torch.equal(first, again)
    rows = first[packed.cu_seqlens[:-1].long()]
    dropped = torch.tensor([relative_error(row, null) < 1e-4 for row in rows])
    kept = torch.tensor([relative_error(row, labelled) < 1e-4 for row in rows])
    assert (dropped ^ kept).all()
    assert 20 <= int(dropped.sum()) <= 60  # 10 % of 400, three standard deviations


def test_fast_and_reference_operators_agree(tiny_dit, random_mix, monkeypatch):
    packed = random_mix(seed=8)
    weight = torch.randn(packed.tokens.shape)
    monkeypatch.delenv("CAT_FAST_BACKEND", raising=False)
    fast = output_and_gradients(tiny_dit, [packed], [weight])
    monkeypatch.setenv("CAT_FAST_BACKEND", "reference")
    plain = output_and_gradients(tiny_dit, [packed], [weight])
    assert relative_error(fast[0], plain[0]) <= 1e-5
    assert relative_error(fast[1], plain[1]) <= 1e-5
    for name, gradient in plain[2].items():
        assert relative_error(fast[2][name], gradient) <= 1e-5, name


def test_invalid_inputs_are_rejected(tiny_dit, random_mix):
    packed = random_mix(seed=0, count=2)
    with pytest.raises(UserError, match=r"ratio: expected one of \(8, 16, 32\), got 4"):
        tiny_dit(packed.replace(ratio=torch.tensor([4, 8], dtype=torch.int32)))
    with pytest.raises(UserError, match=r"labels: expected 0 \.\. 10, got 3 \.\. 11"):
        tiny_dit(packed, labels=torch.tensor([3, 11]))
    with pytest.raises(UserError, match=r"timesteps: expected \(2,\)"):
        tiny_dit(packed.replace(timestep=None))
    with pytest.raises(
        UserError, match=r"tokens: expected 16 features \(4 channels at patch size 2\), got 32"
    ):
        tiny_dit(PackedSequence.from_latents([torch.zeros(8, 4, 4)], [8], labels=[0]))
    with pytest.raises(UserError, match="hidden_size: expected a multiple of 4 and of num_heads 5, got 50"):
        DiT(hidden_size=50, num_heads=5)
