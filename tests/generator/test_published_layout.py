"""A state dict in the original DiT's layout, loaded by `DiT` and by diffusers' DiTTransformer2DModel."""

import pickle

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors.torch import save_file

from cat_fast.errors import UserError
from cat_fast.generator import DiT
from cat_fast.packing import PackedSequence

WIDTH, DEPTH, CLASSES, HEADS = 128, 2, 10, 2


def published_state(side: int, channels: int = 4) -> dict[str, torch.Tensor]:
    """Return random weights named as in facebookresearch/DiT, with variances (learn_sigma) and positions."""
    generator = torch.Generator().manual_seed(side)
    linears = {
        "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
        "x_embedder.proj": (WIDTH, channels, 2, 2),
        "final_layer.linear": (4 * 2 * channels, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }
    for i in range(DEPTH):
        linears |= {
            f"blocks.{i}.attn.qkv": (3 * WIDTH, WIDTH),
            f"blocks.{i}.attn.proj": (WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc1": (4 * WIDTH, WIDTH),
            f"blocks.{i}.mlp.fc2": (WIDTH, 4 * WIDTH),
            f"blocks.{i}.adaLN_modulation.1": (6 * WIDTH, WIDTH),
        }
    shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    shapes["y_embedder.embedding_table.weight"] = (CLASSES + 1, WIDTH)
    state = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    state["pos_embed"] = get_2d_sincos_pos_embed(WIDTH, side, base_size=side, output_type="pt")[None].float()
    return state


def to_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the original's weights for diffusers, which has a copy of both embedders in every block."""
    renamed = {"x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out_2"}
    renamed["final_layer.adaLN_modulation.1"] = "proj_out_1"
    result = {}
    for i in range(DEPTH):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        renamed |= {
            f"{ours}.attn.proj": f"{theirs}.attn1.to_out.0",
            f"{ours}.mlp.fc1": f"{theirs}.ff.net.0.proj",
            f"{ours}.mlp.fc2": f"{theirs}.ff.net.2",
            f"{ours}.adaLN_modulation.1": f"{theirs}.norm1.linear",
        }
        emb = f"{theirs}.norm1.emb"
        result[f"{emb}.class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
        for kind in ("weight", "bias"):
            result[f"{emb}.timestep_embedder.linear_1.{kind}"] = state[f"t_embedder.mlp.0.{kind}"]
            result[f"{emb}.timestep_embedder.linear_2.{kind}"] = state[f"t_embedder.mlp.2.{kind}"]
            for name, part in zip("qkv", state[f"{ours}.attn.qkv.{kind}"].chunk(3), strict=True):
                result[f"{theirs}.attn1.to_{name}.{kind}"] = part
    for ours, theirs in renamed.items():
        for kind in ("weight", "bias"):
            result[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
    return result


def diffusers_model(state: dict[str, torch.Tensor], side: int) -> DiTTransformer2DModel:
    theirs = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=DEPTH,
        sample_size=2 * side,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    ).eval()
    missing, unexpected = theirs.load_state_dict(to_diffusers(state), strict=False)
    assert not unexpected
    assert set(missing) <= {"pos_embed.pos_embed"}  # constant, so some versions do not store it
    for block in theirs.transformer_blocks:
        # diffusers spaces the timestep frequencies by 1 / (half - 1) where the original has 1 / half
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return theirs


@pytest.mark.parametrize("wrapped", [False, True], ids=["weights", "checkpoint"])
@pytest.mark.parametrize("side", [8, 16])
def test_published_checkpoints_give_the_outputs_of_diffusers_dit(side, wrapped, tmp_path):
    """Compare the predicted noise; the last channels are variances. Training checkpoints load their EMA."""
    state = published_state(side)
    path = tmp_path / "DiT-XL-2-512x512.pt"
    torch.save({"model": {}, "ema": state, "args": MaliciousArguments()} if wrapped else state, path)
    ours = DiT.from_pretrained(path, num_heads=HEADS)
    assert (ours.config.position_frame, ours.config.num_heads, ours.config.ratios) == (side, HEADS, (8,))
    assert ours.config.beta_schedule == "linear"
    assert DiT.from_pretrained(path, num_heads=HEADS, torch_dtype=torch.bfloat16).dtype == torch.bfloat16

    torch.manual_seed(1)
    latents = torch.randn(3, 4, 2 * side, 2 * side)
    labels, timesteps = torch.tensor([1, 9, 10]), torch.tensor([0, 500, 999])
    packed = PackedSequence.from_latents(list(latents), [8, 8, 8])
    with torch.no_grad():
        theirs = diffusers_model(state, side)
        expected = theirs(latents, timestep=timesteps, class_labels=labels).sample[:, :4]
        got = torch.stack(packed.replace(tokens=ours(packed, timesteps, labels).sample).to_latents())
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


class MaliciousArguments:
    """Stand-in for the pickled arguments of a training checkpoint: code that a reader could execute."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a checkpoint ran its code')",)


def test_other_files_and_positions_are_rejected(tmp_path):
    path = tmp_path / "model.pt"
    with pytest.raises(UserError, match="no such file"):
        DiT.from_pretrained(path)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="expected a DiT checkpoint of facebookresearch/DiT"):
        DiT.from_pretrained(path)
    path.write_bytes(pickle.dumps("text"))
    with pytest.raises(UserError, match=r"model\.pt: "):
        DiT.from_pretrained(path)
    state = published_state(8)
    torch.save(state | {"pos_embed": state["pos_embed"].flip(1)}, path)
    with pytest.raises(UserError, match="expected the pos_embed of facebookresearch/DiT"):
        DiT.from_pretrained(path, num_heads=HEADS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_embed": torch.zeros(64, WIDTH)}, "expected the pos_embed"),
        (
            {"blocks.0.extra.weight": torch.zeros(1)},
            r"contain blocks\.0\.extra\.weight, which the model does not",
        ),
        ({"blocks.1.attn.qkv.bias": None}, r"blocks\.1\.attn\.qkv\.bias is missing from its weights"),
        ({"blocks.1.attn.qkv.bias": torch.zeros(3)}, r"qkv\.bias has shape \(3,\), expected \(384,\)"),
        ({"final_layer.linear.bias": torch.zeros(4 * 12)}, "has 48 outputs, expected 16, or twice as many"),
        ({"x_embedder.proj.weight": torch.zeros(WIDTH, 16)}, r"expected \(D, c, p, p\)"),
    ],
    ids=["positions", "extra", "missing", "shape", "outputs", "embedder"],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, changes, message):
    state = {name: value for name, value in (published_state(8) | changes).items() if value is not None}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match=message) as caught:
        DiT.from_pretrained(tmp_path / "model.pt", num_heads=HEADS)
    assert str(caught.value).startswith(f"{tmp_path}/model.pt: ")
    assert "\n" not in str(caught.value)


def test_heads_that_the_weights_do_not_show_must_be_given(tmp_path):
    """The weights fit any number of heads; a wrong one changes the outputs silently."""
    state = published_state(8)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"width 128 and depth 2 is not a published one.*pass num_heads"):
        DiT.from_pretrained(tmp_path / "model.pt")
    packed = PackedSequence.from_latents([torch.randn(4, 16, 16)], [8])
    outputs = []
    for heads in (2, 4):
        model = DiT.from_pretrained(tmp_path / "model.pt", num_heads=heads)
        assert model.config.num_heads == heads
        with torch.no_grad():
            outputs.append(model(packed, torch.tensor([500]), torch.tensor([1])).sample)
    assert not torch.allclose(*outputs, rtol=1e-3)
    with pytest.raises(UserError, match="multiple of 4 and of num_heads 3"):
        DiT.from_pretrained(tmp_path / "model.pt", num_heads=3)


@pytest.mark.parametrize("option", ["hidden_size", "num_head", "subfolder", "variant", "position_frame"])
def test_options_that_a_file_does_not_understand_raise(tmp_path, option):
    torch.save(published_state(8), tmp_path / "model.pt")
    with pytest.raises(UserError, match=f"unexpected argument '{option}'.*num_heads"):
        DiT.from_pretrained(tmp_path / "model.pt", num_heads=HEADS, **{option: 12})


def test_options_that_a_file_understands_apply(tmp_path):
    torch.save(published_state(8), tmp_path / "model.pt")
    config = DiT.from_pretrained(
        tmp_path / "model.pt",
        num_heads=HEADS,
        ratios=(8, 16),
        scaling_factor=0.5,
        class_dropout_prob=0.2,
        local_files_only=True,
        torch_dtype=torch.float64,
    ).config
    assert (config.ratios, config.scaling_factor, config.class_dropout_prob) == ((8, 16), 0.5, 0.2)
    assert DiT.from_pretrained(tmp_path / "model.pt", num_heads=HEADS).config.scaling_factor == 0.18215


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", ["half", "cast back"])
def test_checkpoints_in_half_precision_load(tmp_path, dtype, stored):
    """Rounding moves pos_embed by up to 4e-3."""
    state = {name: value.to(dtype) for name, value in published_state(16).items()}
    state = {name: value.float() for name, value in state.items()} if stored == "cast back" else state
    torch.save(state, tmp_path / "model.pt")
    model = DiT.from_pretrained(tmp_path / "model.pt", num_heads=HEADS)
    assert model.dtype == (torch.float32 if stored == "cast back" else dtype)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapped", [False, True], ids=["weights", "checkpoint"])
def test_prefixes_of_wrapper_modules_are_removed(tmp_path, prefix, wrapped):
    state = published_state(8)
    renamed = {prefix + name: value for name, value in state.items()}
    torch.save({"ema": renamed, "epoch": 3} if wrapped else renamed, tmp_path / "model.pt")
    model = DiT.from_pretrained(tmp_path / "model.pt", num_heads=HEADS)
    assert torch.equal(model.t_embedder.mlp[0].weight, state["t_embedder.mlp.0.weight"])


def test_compiled_blocks_and_safetensors_load(tmp_path):
    state = {
        name.replace("blocks.1.", "blocks.1._orig_mod."): value.contiguous()
        for name, value in published_state(8).items()
    }
    save_file(state, tmp_path / "model.safetensors")
    model = DiT.from_pretrained(tmp_path / "model.safetensors", num_heads=HEADS)
    assert torch.equal(model.blocks[1].attn.qkv.bias, state["blocks.1._orig_mod.attn.qkv.bias"])


def test_a_weight_under_two_names_is_refused(tmp_path):
    state = published_state(8)
    torch.save(state | {"module.pos_embed": state["pos_embed"]}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"pos_embed and module\.pos_embed are both the weight pos_embed"):
        DiT.from_pretrained(tmp_path / "model.pt", num_heads=HEADS)


def with_rows(rows: int) -> dict[str, torch.Tensor]:
    return published_state(8) | {"y_embedder.embedding_table.weight": torch.zeros(rows, WIDTH)}


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        (10, None, "10 rows for 10 classes, but DiT needs one more for the null class"),
        (1000, None, "1000 rows for 1000 classes, but DiT needs one more for the null class"),
        (7, 7, "7 rows for 7 classes, but DiT needs one more for the null class"),
        (7, None, "do not show whether the last is the null class; pass num_classes=6 if it is"),
        (7, 5, "7 rows, expected 6 for num_classes=5 and the null class"),
    ],
)
def test_a_dit_without_a_null_class_is_refused(tmp_path, rows, given, message):
    """With its last class taken for the null class, guidance is wrong and that class cannot be drawn."""
    torch.save(with_rows(rows), tmp_path / "model.pt")
    options = {} if given is None else {"num_classes": given}
    with pytest.raises(UserError, match=message) as caught:
        DiT.from_pretrained(tmp_path / "model.pt", num_heads=HEADS, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "given"), [(11, {}), (1001, {}), (7, {"num_classes": 6}), (10, {"num_classes": 9})]
)
def test_a_dit_with_a_null_class_loads(tmp_path, rows, given):
    torch.save(with_rows(rows), tmp_path / "model.pt")
    assert DiT.from_pretrained(tmp_path / "model.pt", num_heads=HEADS, **given).config.num_classes == rows - 1
