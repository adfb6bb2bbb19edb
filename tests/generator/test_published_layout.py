"""One state dict in the original DiT's layout, in our model and in diffusers' DiTTransformer2DModel."""

import torch
from diffusers import DiTTransformer2DModel

from cat_fast.packing import PackedSequence


def to_diffusers(state: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """The original's names -> diffusers', which holds a copy of both embedders in every block."""
    renamed = {"x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out_2"}
    renamed["final_layer.adaLN_modulation.1"] = "proj_out_1"
    result = {}
    for i in range(depth):
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


def test_same_weights_same_output_as_diffusers_dit(tiny_dit):
    torch.nn.init.zeros_(tiny_dit.ratio_embedder.embedding_table.weight)  # the original knows no ratio
    theirs = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    ).eval()
    missing, unexpected = theirs.load_state_dict(to_diffusers(tiny_dit.state_dict(), depth=2), strict=False)
    assert not unexpected
    assert set(missing) <= {"pos_embed.pos_embed"}  # fixed, so not every version stores it

    for block in theirs.transformer_blocks:
        # diffusers spaces the timestep frequencies by 1 / (half - 1) where the original has 1 / half
        block.norm1.emb.time_proj.downscale_freq_shift = 0

    torch.manual_seed(1)
    latents = torch.randn(3, 4, 16, 16)
    labels, timesteps = torch.tensor([1, 9, 10]), torch.tensor([0, 500, 999])
    packed = PackedSequence.from_latents(list(latents), [8, 8, 8])
    with torch.no_grad():
        expected = theirs(latents, timestep=timesteps, class_labels=labels).sample
        got = torch.stack(packed.replace(tokens=tiny_dit(packed, timesteps, labels)).to_latents())
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
