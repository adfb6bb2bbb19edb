"""Options of the DiT: packed images stay independent, and each option matches its paper."""

import math

import pytest
import torch
from diffusers.models.activations import SwiGLU as DiffusersSwiGLU
from torch._dynamo.testing import CompileCounterWithBackend

from cat_fast.errors import UserError
from cat_fast.generator import DiT, PackedText
from cat_fast.generator.blocks import SwiGLU
from cat_fast.generator.embeddings import image_positions, rotate, rotation_angles
from cat_fast.packing import PackedSequence

TEXT = {"text_dim": 12}
ALL = {"shared_adaln": True, "qk_norm": True, "rope": True, "swiglu": True} | TEXT
WIDE = {"hidden_size": 96}
"""Head dimension 48, which the compiled attention supports; it does not support 24."""
VARIANTS = {
    "published": {},
    **{name: {name: value} for name, value in ALL.items()},
    "pooled_text": TEXT | {"pooled_text": True},
    "all": ALL | {"pooled_text": True},
}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def results(model, pieces):
    """Return the outputs of (packed, text, weight) pieces, and all gradients of sum(output * weight)."""
    model.zero_grad()
    outputs, inputs, texts = [], [], []
    for packed, text, weight in pieces:
        tokens = packed.tokens.clone().requires_grad_()
        if text is not None:
            words = text.tokens.clone().requires_grad_()
            text = PackedText(tokens=words, cu_seqlens=text.cu_seqlens, max_seqlen=text.max_seqlen)
        output = model(packed.replace(tokens=tokens), text=text).sample
        (output * weight).sum().backward()
        outputs.append(output.detach())
        inputs.append(tokens.grad)
        if text is not None:
            texts.append(words.grad)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    gradients["tokens"] = torch.cat(inputs)
    if texts:
        gradients["texts"] = torch.cat(texts)
    return torch.cat(outputs), gradients


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", VARIANTS)
def test_packed_equals_each_image_alone(make_dit, random_mix, random_texts, name, seed):
    """Compare outputs and gradients for images of all ratios and many shapes, and texts of many lengths."""
    model = make_dit(**WIDE, **VARIANTS[name])
    packed = random_mix(seed, count=8, stretch=3)
    text = random_texts(seed, count=8) if model.config.text_dim else None
    weight = torch.randn(packed.tokens.shape)
    together = results(model, [(packed, text, weight)])
    alone_packs = packed.split()
    weights = weight.split([part.num_tokens for part in alone_packs])
    texts = [None] * 8 if text is None else text.split()
    alone = results(model, zip(alone_packs, texts, weights, strict=True))
    assert relative_error(together[0], alone[0]) <= 1e-5
    assert together[1].keys() == alone[1].keys()
    for parameter, gradient in alone[1].items():
        assert gradient.any(), parameter
        assert relative_error(together[1][parameter], gradient) <= 1e-5, parameter


def test_an_image_is_independent_of_order_and_content_of_its_neighbours(make_dit, random_mix, random_texts):
    model = make_dit(**WIDE, **ALL)
    pieces = list(zip(random_mix(5, stretch=2).split(), random_texts(5).split(), strict=True))
    first, text = pieces[-1]
    expected = model(first, text=text).sample
    loud = [(p.replace(tokens=p.tokens * 100), t.to()) for p, t in pieces[:-1]]
    for order in (pieces, pieces[::-1], [*loud, pieces[-1]]):
        packs, texts = zip(*order, strict=True)
        together = model(PackedSequence.concat(packs), text=PackedText.concat(texts)).sample
        lengths = [p.num_tokens for p in packs]
        own = together.split(lengths)[[p is first for p in packs].index(True)]
        assert relative_error(own, expected) <= 1e-5


def test_no_text_equals_the_null_text(make_dit, random_mix, random_texts):
    model = make_dit(**TEXT)
    packed, text = random_mix(1), random_texts(1)
    null = model(packed).sample
    assert relative_error(model(packed, text=text.null()).sample, null) <= 1e-6
    mixed, length = model(packed, text=text).sample, packed.split()[0].num_tokens
    assert relative_error(mixed[:length], null[:length]) <= 1e-5  # the first text is empty
    assert relative_error(mixed[length:], null[length:]) > 1e-3


@pytest.mark.parametrize(("alone", "expected"), [(None, 100), (0.4, 400)])
def test_dropout_of_all_conditioning_and_of_labels_alone(make_dit, random_mix, alone, expected):
    """10 % of 1000 sequences lose label and text, others the label alone, within four standard deviations."""
    model = make_dit(**TEXT, label_dropout_prob=alone)
    packed = PackedSequence.concat([random_mix(2, count=1)] * 1000)
    text = PackedText.of([torch.randn(4, 12, generator=torch.Generator().manual_seed(0))] * 1000)
    unlabelled = packed.replace(label=torch.full_like(packed.label, 10))
    kinds = {
        "conditional": model(packed, text=text).sample[0],
        "unconditional": model(unlabelled, text=text.null()).sample[0],
        "label alone": model(unlabelled, text=text).sample[0],
    }
    model.train()
    first, again = (
        model(packed, text=text, generator=torch.Generator().manual_seed(7)).sample for _ in range(2)
    )
    assert torch.equal(first, again)
    rows = first[packed.cu_seqlens[:-1].long()]
    counts = {kind: sum(relative_error(row, kinds[kind]) < 1e-4 for row in rows.unbind()) for kind in kinds}
    assert sum(counts.values()) == 1000
    for kind, mean in (("unconditional", 100), ("label alone", expected)):
        assert abs(counts[kind] - mean) <= 4 * math.sqrt(mean * (1 - mean / 1000)), kind


def test_labels_have_no_effect_if_training_drops_all_of_them(make_dit, random_mix, random_texts):
    model = make_dit(**TEXT, label_dropout_prob=0.9).train()
    packed, text = random_mix(2), random_texts(2)
    seeded = [
        model(packed.replace(label=label), text=text, generator=torch.Generator().manual_seed(1)).sample
        for label in (packed.label, torch.zeros_like(packed.label))
    ]
    assert torch.equal(*seeded)


def test_pooled_text_is_the_mean_of_the_embedded_tokens_with_the_null_token(
    make_dit, random_mix, random_texts
):
    model, packed, text = make_dit(**TEXT, pooled_text=True), random_mix(2), random_texts(2)
    embedded = model.text_embedder(text, None)
    expected = torch.stack([model.text_pool.proj(part.tokens.mean(0)) for part in embedded.split()])
    torch.testing.assert_close(model.text_pool(embedded), expected)
    with torch.no_grad():
        before = model(packed, text=text).sample
        model.text_pool.proj.weight.zero_()
        assert relative_error(model(packed, text=text).sample, before) > 1e-3


def test_attention_with_rope_depends_only_on_relative_positions():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 5, 3, 24, generator=generator, dtype=torch.float64).float()
    positions = 8 * torch.rand(5, 2, generator=generator)

    def scores(positions):
        angle = rotation_angles(positions, 24)
        return torch.einsum("ihd,jhd->hij", rotate(q, angle), rotate(k, angle))

    shifted = positions + torch.tensor([3.0, -2.0])
    torch.testing.assert_close(scores(shifted), scores(positions), atol=1e-4, rtol=1e-4)
    assert relative_error(scores(positions.flip(1)), scores(positions)) > 0.1  # y and x are distinguished


def test_rope_equals_complex_rotation():
    x, positions = torch.randn(6, 2, 24), 8 * torch.rand(6, 2)
    frequency = 100.0 ** -(torch.arange(6, dtype=torch.float64) / 6)
    angle = torch.cat([positions[:, 1:].double() * frequency, positions[:, :1].double() * frequency], dim=1)
    turned = torch.complex(*x.double().chunk(2, dim=2)) * torch.polar(torch.ones_like(angle), angle)[:, None]
    expected = torch.cat([turned.real, turned.imag], dim=2)
    torch.testing.assert_close(
        rotate(x, rotation_angles(positions, 24)).double(), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("shape", [(4, 4), (2, 4), (4, 3)], ids=str)
def test_rope_uses_image_positions_at_every_ratio(shape):
    """A token of a coarse grid has the mean angle of the four tokens that cover it in a finer one."""
    height, width = shape
    coarse = torch.zeros(1, 2 * height, 2 * width)
    fine = torch.zeros(1, 4 * height, 4 * width)
    packed = PackedSequence.from_latents([coarse, fine], [16, 8])
    angles = rotation_angles(image_positions(packed, 32), 72)
    of_coarse, of_fine = angles.split([height * width, 4 * height * width])
    quarters = of_fine.view(height, 2, width, 2, 36).mean((1, 3)).flatten(0, 1)
    torch.testing.assert_close(of_coarse, quarters)


def test_shared_modulation_equals_per_block_modulations_with_equal_weights(make_dit, random_mix):
    """The per-block modulations differ only in their biases: shared bias plus the block's table."""
    shared, own = make_dit(shared_adaln=True), make_dit()
    state = shared.state_dict()
    for i in range(2):
        table = state.pop(f"blocks.{i}.modulation_table")
        state[f"blocks.{i}.adaLN_modulation.1.weight"] = state["adaLN_modulation.1.weight"]
        state[f"blocks.{i}.adaLN_modulation.1.bias"] = state["adaLN_modulation.1.bias"] + table
    own.load_state_dict({name: value for name, value in state.items() if name[:5] != "adaLN"})
    packed = random_mix(3)
    assert relative_error(shared(packed).sample, own(packed).sample) <= 1e-5


def test_qk_norm_makes_attention_independent_of_query_and_key_scale(make_dit, random_mix, random_texts):
    packed, text = random_mix(3), random_texts(3)
    errors = []
    for options in (TEXT | {"qk_norm": True}, TEXT):
        model = make_dit(**options)
        before = model(packed, text=text).sample
        with torch.no_grad():
            for block in model.blocks:
                block.attn.qkv.weight[:96] *= 100
                block.attn.qkv.bias[:96] *= 100
                for part in (block.cross_attn.q, block.cross_attn.kv):
                    part.weight[:48] *= 100
                    part.bias[:48] *= 100
        errors.append(relative_error(model(packed, text=text).sample, before))
    assert errors[0] < 1e-3 < errors[1]  # 1e-6 is added to the mean square


def test_swiglu_equals_diffusers():
    ours = SwiGLU(48, 4.0)
    theirs = DiffusersSwiGLU(48, 128)
    value, gate = theirs.proj.weight.chunk(2)
    value_bias, gate_bias = theirs.proj.bias.chunk(2)
    ours.fc1.weight.data = torch.cat([gate, value]).detach()
    ours.fc1.bias.data = torch.cat([gate_bias, value_bias]).detach()
    x = torch.randn(5, 48)
    torch.testing.assert_close(ours(x), ours.fc2(theirs(x)))


def test_a_fresh_model_with_every_option_predicts_zero_and_learns(random_mix, random_texts):
    torch.manual_seed(0)
    model = DiT(in_channels=4, hidden_size=48, depth=2, num_heads=2, num_classes=10, **ALL)
    packed, text = random_mix(0), random_texts(0)
    assert not model(packed, text=text).sample.any()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(40):
        loss = (model.eval()(packed, text=text).sample - packed.tokens).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_invalid_options_and_texts_are_rejected(make_dit, random_mix, random_texts):
    packed, text = random_mix(0), random_texts(0)
    with pytest.raises(UserError, match="text: expected None, because this model has no text_dim"):
        make_dit()(packed, text=text)
    with pytest.raises(UserError, match="expected 6 texts of width 12, got 5 of width 12"):
        make_dit(**TEXT)(packed, text=random_texts(0, count=5))
    with pytest.raises(UserError, match="expected hidden_size / num_heads to be a multiple of 4, got 10"):
        make_dit(hidden_size=20, rope=True)
    with pytest.raises(UserError, match=r"class_dropout_prob: expected a value in \[0, 0.5\), got 0.5"):
        make_dit(class_dropout_prob=0.5, **TEXT)
    with pytest.raises(UserError, match=r"label_dropout_prob: expected a value in \[0, 0.8\], got 0.9"):
        make_dit(class_dropout_prob=0.2, label_dropout_prob=0.9, **TEXT)
    with pytest.raises(UserError, match="label_dropout_prob: expected None for a model without text_dim"):
        make_dit(label_dropout_prob=0.1)
    with pytest.raises(UserError, match="pooled_text: expected false for a model without text_dim"):
        make_dit(pooled_text=True)
    with pytest.raises(UserError, match="noise_shift_tokens: expected a positive number, got 0"):
        make_dit(noise_shift_tokens=0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, ALL], ids=["published", "all"])
def test_changing_batches_need_no_recompilation(make_dit, options):
    """T, S, the longest sequence, L and the longest text change in every step, forward and backward.

    All sizes exceed 1, which torch.compile specializes, and those of the first step are distinct.
    """
    model = make_dit(**WIDE, **options).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    warm = 0
    for step, sides in enumerate(([8, 4, 4, 2, 8], [4, 2, 4], [2, 2], [8] * 3 + [4] * 9, [2] * 7, [8, 2])):
        latents = [torch.randn(4, 2 * side, 2 * side) for side in sides]
        packed = PackedSequence.from_latents(latents, [64 // side for side in sides], labels=[1] * len(sides))
        packed = packed.replace(timestep=torch.randint(1000, (len(sides),)))
        words = [torch.randn(3 * i * (step + 1) % 10, 12) for i in range(len(sides))]
        text = {"text": PackedText.of(words)} if model.config.text_dim else {}
        compiled(packed, **text).sample.sum().backward()
        warm = warm or counter.frame_count
    assert counter.frame_count - warm <= 1
    assert math.isfinite(sum(p.grad.sum().item() for p in model.parameters()))
