"""`DiT`: the diffusion transformer (Peebles & Xie, arXiv:2212.09748) over packed mixed-ratio sequences.

One forward pass takes latents of any mix of ratios as one run of tokens. What differs from the original is
only what that asks for: attention stays inside each sequence, positions are those in the image, modulation
is computed once a sequence, and the ratio is part of the conditioning. Module names are the original's, so
its weights load. What it does not have is optional: text beside the class, RoPE, normalised queries and keys,
SwiGLU, one modulation for all blocks.

Shapes: S sequences, T tokens, D hidden size, H heads, C = patch_size^2 * in_channels.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from cat_fast.errors import UserError
from cat_fast.generator.blocks import BlockOptions, Branch, DiTBlock, FinalLayer, Surroundings, modulation
from cat_fast.generator.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    RatioEmbedder,
    TextEmbedder,
    TimestepEmbedder,
    image_positions,
    position_embedding,
    rotation_angles,
)
from cat_fast.generator.packed_text import PackedText
from cat_fast.generator.pretrained import from_dit_checkpoint
from cat_fast.packing import PackedSequence


class DiT(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both define config_name
    """Predicts the noise in packed latents, given a timestep, a label and perhaps a text for each sequence.

    Args:
        in_channels: channels of a latent.
        patch_size: side of a token in latent pixels.
        hidden_size: width D; divisible by 4 and by `num_heads`.
        depth: number of blocks.
        num_heads: attention heads; head dimension is hidden_size / num_heads (72 in DiT-XL).
        mlp_ratio: width of the MLP relative to D.
        num_classes: classes; index `num_classes` is the null class.
        class_dropout_prob: probability of training without condition, which guidance needs: on the null class
            instead of the label, and on the null text. A model with text loses the label alone as often
            again, so that a text alone is enough to draw from.
        ratios: the compression ratios that latents may have.
        position_frame: side of the coordinate frame that every image is laid into; as many units as the
            largest grid has tokens a side (32 for 8x at 512 px).
        shared_adaln: one modulation for all blocks, to which each adds constants of its own (PixArt's
            adaLN-single, arXiv:2310.00426), instead of one a block: DiT-XL loses a third of its parameters.
        qk_norm: RMS norm over each head's queries and keys.
        rope: rotate queries and keys by their places in the image, beside adding those to the tokens.
        swiglu: SwiGLU of the same size instead of the MLP with GELU.
        text_dim: width of text tokens, which every block then attends to; None is class-conditional only.
        shift_factor, scaling_factor: the model sees (latent - shift_factor) * scaling_factor, one number or
            one a channel. Kept here for whoever decodes its samples; the forward pass does not apply them.
        tokenizer_fingerprint: of the tokenizer whose latents it was trained on, if known.
        text_encoder_fingerprint: of the text encoder that it was trained with, if any and known.
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
        shared_adaln: bool = False,
        qk_norm: bool = False,
        rope: bool = False,
        swiglu: bool = False,
        text_dim: int | None = None,
        shift_factor: float | Sequence[float] = 0.0,
        scaling_factor: float | Sequence[float] = 1.0,
        tokenizer_fingerprint: str | None = None,
        text_encoder_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads or hidden_size % 4:
            raise UserError(f"hidden_size {hidden_size} must be divisible by 4 and by num_heads {num_heads}")
        head_dim = hidden_size // num_heads
        if rope and head_dim % 4:
            raise UserError(f"rope: the head dimension {head_dim} must be divisible by 4")
        most = 1.0 if text_dim is None else 0.5
        if not 0 <= class_dropout_prob < most:
            raise UserError(f"class_dropout_prob {class_dropout_prob} must lie in [0, {most:g})")
        token_dim = patch_size**2 * in_channels
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.ratio_embedder = RatioEmbedder(tuple(ratios), hidden_size)
        has_text = text_dim is not None
        if text_dim is not None:
            self.text_embedder = TextEmbedder(text_dim, hidden_size)
        if shared_adaln:
            self.adaLN_modulation = modulation(hidden_size, 9 if has_text else 6)
        options = BlockOptions(
            qk_norm=qk_norm, swiglu=swiglu, shared_adaln=shared_adaln, cross_attention=has_text
        )
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, options) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, token_dim)
        self.gradient_checkpointing = False
        self._initialise()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **options: Any
    ) -> Self:
        """A trained model, in evaluation mode, from a folder or a name on the Hugging Face hub.

        Also loads a `.pt` checkpoint of the original DiT, such as DiT-XL-2-512x512.pt, of which only tensors
        are read; without its second half of outputs, the variances, which nothing here uses. `options` are
        those of diffusers.

        Raises:
            UserError: a checkpoint that is none of a DiT.
        """
        name = str(pretrained_model_name_or_path)
        if Path(name).suffix != ".pt":
            return super().from_pretrained(name, **options)
        published = from_dit_checkpoint(Path(name))
        model = cls(**published.arguments)
        nn.init.zeros_(model.ratio_embedder.embedding_table.weight)
        model.load_state_dict(published.state | {RATIO_TABLE: model.state_dict()[RATIO_TABLE]})
        dtype = options.get("torch_dtype") or next(iter(published.state.values())).dtype
        return model.to(dtype).eval()

    def forward(
        self,
        packed: PackedSequence,
        timesteps: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        text: PackedText | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Predicted noise, (T, C), features in the order of the packed tokens.

        Args:
            packed: noisy latents, packed with this model's patch size.
            timesteps: (S,) in 0 .. 999; `packed.timestep` if not given.
            labels: (S,) int64 in 0 .. num_classes (the last is the null class); `packed.label` if not given.
            text: a text for each sequence, for a model with text; all null if not given.
            generator: source of the dropout of labels and texts in training; torch's default generator if not
                given.

        Raises:
            UserError: tokens of another width, a ratio, label or row count the model does not know, or text
                that it does not take.
        """
        timesteps = packed.timestep if timesteps is None else timesteps
        labels = packed.label if labels is None else labels
        timesteps, labels = self._check(packed, timesteps, labels, text)
        config = self.config
        labels, unconditional = self.y_embedder.drop(labels, generator, alone=config.text_dim is not None)
        condition = self.t_embedder(timesteps) + self.y_embedder(labels) + self.ratio_embedder(packed.ratio)
        positions = image_positions(packed, config.position_frame)
        head_dim = config.hidden_size // config.num_heads
        around = Surroundings(
            condition=condition,
            modulation=self.adaLN_modulation(condition) if config.shared_adaln else None,
            cu_seqlens=packed.cu_seqlens,
            max_seqlen=packed.max_seqlen,
            rotation=rotation_angles(positions, head_dim) if config.rope else None,
            text=None if config.text_dim is None else self._embedded(packed, text, unconditional),
        )
        x = self.x_embedder(packed.tokens.to(self.dtype))
        x = x + position_embedding(positions, config.hidden_size).to(self.dtype)
        branch: Branch | None = None
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:  # keeps x and h of each block
                x, branch = self._gradient_checkpointing_func(block, x, branch, around)
            else:
                x, branch = block(x, branch, around)
        return self.final_layer(x, branch, condition, packed.cu_seqlens)

    def _embedded(
        self, packed: PackedSequence, text: PackedText | None, unconditional: torch.Tensor | None
    ) -> PackedText:
        """The text as blocks see it, null where there is none."""
        if text is None:
            text = PackedText(
                tokens=packed.tokens.new_empty(0, self.config.text_dim),
                cu_seqlens=torch.zeros_like(packed.cu_seqlens),
                max_seqlen=0,
            )
        return self.text_embedder(text, unconditional)

    def _check(
        self,
        packed: PackedSequence,
        timesteps: torch.Tensor | None,
        labels: torch.Tensor | None,
        text: PackedText | None,
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
        if text is not None and (len(text), text.tokens.shape[1]) != (len(packed), self.config.text_dim):
            raise UserError(
                f"text: expected {len(packed)} texts of width {self.config.text_dim or 'none: no text'}, "
                f"got {len(text)} of width {text.tokens.shape[1]}"
            )
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
        if self.config.text_dim is not None:
            nn.init.normal_(self.text_embedder.null_token, std=0.02)
        nn.init.zeros_(self.ratio_embedder.embedding_table.weight)
        for module in self.t_embedder.mlp:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation." in name or "modulation_table" in name:
                nn.init.zeros_(parameter)


RATIO_TABLE = "ratio_embedder.embedding_table.weight"
"""The one parameter that the original does not have; zero, it changes nothing."""


def _shape(value: torch.Tensor | None) -> str:
    return "none" if value is None else str(tuple(value.shape))
