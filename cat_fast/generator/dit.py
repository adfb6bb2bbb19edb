"""`DiT`: the class-conditional diffusion transformer (Peebles & Xie, 2023) over packed mixed-ratio sequences.

One forward pass takes latents of any mix of ratios as one run of tokens. What differs from the original is
only what that asks for: attention stays inside each sequence, positions are those in the picture, modulation
is computed once a sequence, and the ratio is part of the conditioning. Module names are the original's, so
its weights load.

Shapes: S sequences, T tokens, D hidden size, H heads, C = patch_size^2 * in_channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from cat_fast.errors import UserError
from cat_fast.generator.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    RatioEmbedder,
    TimestepEmbedder,
    position_embedding,
)
from cat_fast.kernels.adaln.op import adaln, gate_residual_adaln
from cat_fast.kernels.varlen_attention.op import varlen_attention
from cat_fast.packing import PackedSequence

NORM_EPS = 1e-6


class DiT(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both define config_name
    """Predicts the noise in packed latents, given a timestep and a label for each sequence.

    Args:
        in_channels: channels of a latent.
        patch_size: side of a token in latent pixels.
        hidden_size: width D; divisible by 4 and by `num_heads`.
        depth: number of blocks.
        num_heads: attention heads; head dimension is hidden_size / num_heads (72 in DiT-XL).
        mlp_ratio: width of the MLP relative to D.
        num_classes: classes; index `num_classes` is the null class.
        class_dropout_prob: probability of training on the null class instead of the label.
        ratios: the compression ratios that latents may have.
        position_frame: side of the coordinate frame that every picture is laid into; as many units as the
            largest grid has tokens a side (32 for 8x at 512 px).
        shift_factor, scaling_factor: the model sees (latent - shift_factor) * scaling_factor, one number or
            one a channel. Kept here for whoever decodes its samples; the forward pass does not apply them.
        tokenizer_fingerprint: of the tokenizer whose latents it was trained on, if known.
    """

    config: Any  # diffusers calls its attribute dictionary a dict
    _supports_gradient_checkpointing = True
    _gradient_checkpointing_func: Any  # set by enable_gradient_checkpointing

    @register_to_config
    def __init__(
        self,
        *,
        in_channels: int = 16,
        patch_size: int = 2,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        ratios: Sequence[int] = (8, 16, 32),
        position_frame: int = 32,
        shift_factor: float | Sequence[float] = 0.0,
        scaling_factor: float | Sequence[float] = 1.0,
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads or hidden_size % 4:
            raise UserError(f"hidden_size {hidden_size} must be divisible by 4 and by num_heads {num_heads}")
        if not 0 <= class_dropout_prob < 1:
            raise UserError(f"class_dropout_prob {class_dropout_prob} must lie in [0, 1)")
        token_dim = patch_size**2 * in_channels
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.ratio_embedder = RatioEmbedder(tuple(ratios), hidden_size)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, token_dim)
        self.gradient_checkpointing = False
        self._initialise()

    def forward(
        self,
        packed: PackedSequence,
        timesteps: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Predicted noise, (T, C), features in the order of the packed tokens.

        Args:
            packed: noisy latents, packed with this model's patch size.
            timesteps: (S,) in 0 .. 999; `packed.timestep` if not given.
            labels: (S,) int64 in 0 .. num_classes (the last is the null class); `packed.label` if not given.
            generator: source of the label dropout in training; torch's default generator if not given.

        Raises:
            UserError: tokens of another width, a ratio, label or row count the model does not know.
        """
        timesteps = packed.timestep if timesteps is None else timesteps
        labels = packed.label if labels is None else labels
        timesteps, labels = self._check(packed, timesteps, labels)

        positions = position_embedding(packed, self.config.hidden_size, self.config.position_frame)
        x = self.x_embedder(packed.tokens.to(self.dtype)) + positions.to(self.dtype)
        c = (
            self.t_embedder(timesteps)
            + self.y_embedder(labels, generator)
            + self.ratio_embedder(packed.ratio)
        )
        branch: Branch | None = None
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:  # keeps x and h of each block
                x, branch = self._gradient_checkpointing_func(
                    block, x, branch, c, packed.cu_seqlens, packed.max_seqlen
                )
            else:
                x, branch = block(x, branch, c, packed.cu_seqlens, packed.max_seqlen)
        return self.final_layer(x, branch, c, packed.cu_seqlens)

    def _check(
        self, packed: PackedSequence, timesteps: torch.Tensor | None, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if packed.tokens.shape[1] != self.final_layer.linear.out_features:
            raise UserError(
                f"tokens have {packed.tokens.shape[1]} features, but {self.config.in_channels} channels at "
                f"patch size {self.config.patch_size} make {self.final_layer.linear.out_features}"
            )
        if timesteps is None or timesteps.shape != packed.ratio.shape:
            raise UserError(
                f"timesteps: expected ({len(packed)},), one for each sequence, got {_shape(timesteps)}"
            )
        if labels is None or labels.shape != packed.ratio.shape:
            raise UserError(f"labels: expected ({len(packed)},), one for each sequence, got {_shape(labels)}")
        if (
            packed.ratio.device.type == "cpu" and not torch.compiler.is_compiling()
        ):  # a GPU would have to stop
            unknown = set(packed.ratio.tolist()) - set(self.config.ratios)
            if unknown:
                raise UserError(f"ratio {min(unknown)} is not among this model's {tuple(self.config.ratios)}")
            if labels.min() < 0 or labels.max() > self.config.num_classes:
                raise UserError(
                    f"labels: expected 0 .. {self.config.num_classes}, "
                    f"got {int(labels.min())} .. {int(labels.max())}"
                )
        return timesteps, labels

    def _initialise(self) -> None:
        """As the original: Xavier weights, zero biases, and every block and the output start as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.zeros_(self.ratio_embedder.embedding_table.weight)
        for module in self.t_embedder.mlp:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)
        for name, parameter in self.named_parameters():
            if ".adaLN_modulation." in name:
                nn.init.zeros_(parameter)


Branch = tuple[torch.Tensor, torch.Tensor]
"""What the residual stream x is still to receive, x += gate * h: h (T, D) and its gate (S, D). It waits for
the next norm, so that one pass over the tokens does both."""


class DiTBlock(nn.Module):
    """x += gate * attention(modulate(norm(x))), then the same with an MLP (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self,
        x: torch.Tensor,
        branch: Branch | None,
        c: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
    ) -> tuple[torch.Tensor, Branch]:
        """x (T, D) and the last block's branch, conditioning c (S, D) -> x, and the branch of this block."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x, y = _receive(x, branch, shift1, scale1, cu_seqlens)
        x, y = _receive(x, (self.attn(y, cu_seqlens, max_seqlen), gate1), shift2, scale2, cu_seqlens)
        return x, (self.mlp(y), gate2)


class Attention(nn.Module):
    """Multi-head self-attention in which a token sees its own sequence only."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> torch.Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)  # [T, H, D / H]
        return self.proj(varlen_attention(q, k, v, cu_seqlens, max_seqlen).flatten(1))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class FinalLayer(nn.Module):
    """Modulated norm and the linear layer to (T, C)."""

    def __init__(self, hidden_size: int, token_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, token_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(
        self, x: torch.Tensor, branch: Branch | None, c: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        _x, y = _receive(x, branch, shift, scale, cu_seqlens)
        return self.linear(y)


def _receive(
    x: torch.Tensor,
    branch: Branch | None,
    shift: torch.Tensor,
    scale: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x with the branch added, if there is one, and norm(x) * (1 + scale) + shift. scale, shift: (S, D)."""
    if branch is None:
        return x, adaln(x, shift, scale, cu_seqlens, NORM_EPS)
    h, gate = branch
    return gate_residual_adaln(x, h, gate, shift, scale, cu_seqlens, NORM_EPS)


def _shape(value: torch.Tensor | None) -> str:
    return "none" if value is None else str(tuple(value.shape))
