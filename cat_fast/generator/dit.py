"""`DiT`: the diffusion transformer (Peebles & Xie, arXiv:2212.09748) over packed mixed-ratio sequences.

One forward pass takes latents of any mix of ratios as one run of tokens. It differs from the original only
where packing requires it: attention is per sequence, positions are relative to the image, modulation is
computed once per sequence, and the ratio is part of the conditioning. Module names are the original's, so
published weights load. Extensions are optional: text, RoPE, QK norm, SwiGLU and shared adaLN.

Shapes: S sequences, T tokens, D hidden size, H heads, C = patch_size^2 * in_channels.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  # pipelines look it up here
from torch import nn

from cat_fast.data.latents.scale import Factor, LatentScale
from cat_fast.errors import UserError
from cat_fast.generator.blocks import BlockContext, BlockOptions, Branch, DiTBlock, FinalLayer, modulation
from cat_fast.generator.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    RatioEmbedder,
    TextEmbedder,
    TextPool,
    TimestepEmbedder,
    image_positions,
    position_embedding,
    rotation_angles,
)
from cat_fast.generator.packed_text import PackedText
from cat_fast.generator.pretrained import CHECKPOINT_ENTRIES, from_dit_checkpoint
from cat_fast.integers import to_integers
from cat_fast.kernels.derivatives import transformed
from cat_fast.packing import PackedSequence
from cat_fast.weights.checked_model import FILE_OPTIONS, CheckedModel, check_options, pop_dtype
from cat_fast.weights.state_file import is_state_file


class DiT(CheckedModel):
    """Diffusion transformer over packed latents, conditioned per sequence on timestep, class, ratio and text.

    Args:
        in_channels: channels of a latent.
        patch_size: side of a token in latent pixels.
        hidden_size: width D; divisible by 4 and by `num_heads`.
        depth: number of blocks.
        num_heads: attention heads; head dimension is hidden_size / num_heads (72 in DiT-XL).
        mlp_ratio: width of the MLP relative to D.
        num_classes: classes; index `num_classes` is the null class.
        class_dropout_prob: probability of training a sequence with the null class and the null text, required
            for classifier-free guidance.
        label_dropout_prob: probability of training a sequence of a model with text with the null class and
            its text, so that it can sample from a text without a class; `class_dropout_prob` if None. With
            1 - class_dropout_prob, the model ignores classes.
        ratios: compression ratios of the latents.
        position_frame: side of the coordinate frame that every image is centred in, in units of one token of
            the largest grid (32 for 8x at 512 px).
        shared_adaln: one modulation for all blocks, to which each adds its own constants (PixArt's
            adaLN-single, arXiv:2310.00426), instead of one per block; saves a third of DiT-XL's parameters.
        qk_norm: RMS norm over each head's queries and keys.
        rope: rotate queries and keys by their image positions, in addition to the position embedding.
        swiglu: SwiGLU with the same parameter count instead of the GELU MLP.
        text_dim: width of the text tokens that every block attends to; None for a class-conditional model.
        pooled_text: also add the mean of the embedded text tokens to the condition of adaLN, as Stable
            Diffusion 3 does (arXiv:2403.03206) with pooled states.
        noise_shift_tokens: number of tokens per sequence at which it was trained on unshifted noise levels
            (see `cat_fast.generator.diffusion.shift_noise`); None if noise levels do not depend on it.
            Sampling shifts its noise levels accordingly.
        shift_factor, scaling_factor: one number, one per channel, or one per channel for each ratio
            ({"8": [...], ...}); the model is trained on (latent - shift_factor) * scaling_factor. Stored for
            decoding; the forward pass ignores them.
        beta_schedule: betas of the noise schedule it was trained with, under diffusers' name, if known;
            sampling refuses others.
        tokenizer_fingerprint: fingerprint of the tokenizer that made the training latents, if known.
        text_encoder_fingerprint: fingerprint of the text encoder used in training, if any and if known.
    """

    config: Any  # diffusers annotates its attribute dictionary as dict
    _supports_gradient_checkpointing = True
    _gradient_checkpointing_func: Any  # set by enable_gradient_checkpointing
    _no_split_modules: Any = ("DiTBlock",)
    _repeated_blocks: Any = ("DiTBlock",)
    _skip_layerwise_casting_patterns: Any = ("x_embedder", "norm")

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
        label_dropout_prob: float | None = None,
        ratios: Sequence[int] = (8, 16, 32),
        position_frame: int = 32,
        shared_adaln: bool = False,
        qk_norm: bool = False,
        rope: bool = False,
        swiglu: bool = False,
        text_dim: int | None = None,
        pooled_text: bool = False,
        noise_shift_tokens: float | None = None,
        shift_factor: Factor = 0.0,
        scaling_factor: Factor = 1.0,
        beta_schedule: str | None = None,
        tokenizer_fingerprint: str | None = None,
        text_encoder_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        ratios = to_integers("ratios", ratios)
        self.register_integers(ratios=ratios)
        if num_heads < 1 or hidden_size % num_heads or hidden_size % 4:
            raise UserError(
                f"hidden_size: expected a multiple of 4 and of num_heads {num_heads}, got {hidden_size}"
            )
        head_dim = hidden_size // num_heads
        if rope and head_dim % 4:
            raise UserError(f"rope: expected hidden_size / num_heads to be a multiple of 4, got {head_dim}")
        label_dropout_prob = _label_dropout(class_dropout_prob, label_dropout_prob, text_dim is not None)
        if pooled_text and text_dim is None:
            raise UserError("pooled_text: expected false for a model without text_dim")
        if noise_shift_tokens is not None and not noise_shift_tokens > 0:
            raise UserError(f"noise_shift_tokens: expected a positive number, got {noise_shift_tokens}")
        LatentScale(shift_factor, scaling_factor).check(ratios, in_channels)
        token_dim = patch_size**2 * in_channels
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob, label_dropout_prob)
        self.ratio_embedder = RatioEmbedder(ratios, hidden_size)
        has_text = text_dim is not None
        if text_dim is not None:
            self.text_embedder = TextEmbedder(text_dim, hidden_size)
        if pooled_text:
            self.text_pool = TextPool(hidden_size)
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
        """Load a trained model in evaluation mode, from a folder or the Hugging Face hub.

        Also loads files of the original DiT, such as DiT-XL-2-512x512.pt. Only tensors are read from them,
        and the outputs that predict variances are dropped.

        Args:
            options: those of diffusers' `from_pretrained`, and config entries to override. For a file:
                `torch_dtype`, options of downloads, which have no effect, and config entries that the file
                does not show: `num_heads` and `num_classes`, required unless the file has the sizes of a
                published model, `class_dropout_prob`, `ratios`, `scaling_factor`, `shift_factor` and
                `tokenizer_fingerprint`.

        Raises:
            UserError: an unknown option, a folder of another class, or weights that do not match the model;
                a file that is not a DiT checkpoint, or one without a null class.
        """
        name = str(pretrained_model_name_or_path)
        if not is_state_file(name):
            return super().from_pretrained(name, **options)
        check_options(f"DiT.from_pretrained of {name}", options, {*CHECKPOINT_ENTRIES, *FILE_OPTIONS})
        dtype = pop_dtype(options)
        entries = {key: value for key, value in options.items() if key in CHECKPOINT_ENTRIES}
        return from_dit_checkpoint(Path(name), entries).build(cls, name, dtype)

    def forward(
        self,
        packed: PackedSequence,
        timesteps: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        text: PackedText | None = None,
        *,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the noise (or velocity) of every token.

        Args:
            packed: noisy latents, packed with this model's patch size.
            timesteps: (S,) in 0 .. 999; `packed.timestep` if None.
            labels: (S,) int64 in 0 .. num_classes (the last is the null class); `packed.label` if None.
            text: one text per sequence, for a model with text; all null if None.
            generator: source of label and text dropout in training; torch's default generator if None.
            return_dict: return a plain tuple if False.

        Returns:
            An output whose `sample` is the prediction, (T, C), features in the order of the packed tokens;
            with `return_dict=False`, a tuple with this tensor.

        Raises:
            UserError: unexpected token width, shape, ratio, label or text.
        """
        timesteps = packed.timestep if timesteps is None else timesteps
        labels = packed.label if labels is None else labels
        timesteps, labels = self._check(packed, timesteps, labels, text)
        config = self.config
        labels, unconditional = self.y_embedder.drop(labels, generator)
        condition = self.t_embedder(timesteps, self.dtype) + self.y_embedder(labels)
        condition = condition + self.ratio_embedder(packed.ratio)
        embedded_text = None if config.text_dim is None else self._embed_text(packed, text, unconditional)
        if embedded_text is not None and config.pooled_text:
            condition = condition + self.text_pool(embedded_text)
        positions = image_positions(packed, config.position_frame)
        head_dim = config.hidden_size // config.num_heads
        context = BlockContext(
            condition=condition,
            modulation=self.adaLN_modulation(condition) if config.shared_adaln else None,
            cu_seqlens=packed.cu_seqlens,
            max_seqlen=packed.max_seqlen,
            rotation=rotation_angles(positions, head_dim) if config.rope else None,
            text=embedded_text,
        )
        x = self.x_embedder(packed.tokens.to(self.dtype))
        x = x + position_embedding(positions, config.hidden_size).to(self.dtype)
        branch: Branch | None = None
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:  # keeps x and h of each block
                x, branch = self._gradient_checkpointing_func(block, x, branch, context)
            else:
                x, branch = block(x, branch, context)
        predicted = self.final_layer(x, branch, condition, packed.cu_seqlens)
        return Transformer2DModelOutput(sample=predicted) if return_dict else (predicted,)

    def _embed_text(
        self, packed: PackedSequence, text: PackedText | None, unconditional: torch.Tensor | None
    ) -> PackedText:
        """Return the embedded texts, all null if `text` is None."""
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
                f"tokens: expected {self.final_layer.linear.out_features} features "
                f"({self.config.in_channels} channels at patch size {self.config.patch_size}), "
                f"got {packed.tokens.shape[1]}"
            )
        if timesteps is None or timesteps.shape != packed.ratio.shape:
            raise UserError(
                f"timesteps: expected ({len(packed)},), one per sequence, got {_shape(timesteps)}"
            )
        if labels is None or labels.shape != packed.ratio.shape:
            raise UserError(f"labels: expected ({len(packed)},), one per sequence, got {_shape(labels)}")
        if text is not None and self.config.text_dim is None:
            raise UserError("text: expected None, because this model has no text_dim")
        if text is not None and (len(text), text.tokens.shape[1]) != (len(packed), self.config.text_dim):
            raise UserError(
                f"text: expected {len(packed)} texts of width {self.config.text_dim}, "
                f"got {len(text)} of width {text.tokens.shape[1]}"
            )
        # values are checked on the CPU only: reading them from a GPU would synchronize
        if packed.ratio.device.type == "cpu" and not torch.compiler.is_compiling():
            unknown = set(packed.ratio.tolist()) - set(self.config.ratios)
            if unknown:
                raise UserError(f"ratio: expected one of {tuple(self.config.ratios)}, got {min(unknown)}")
            # torch.func.vmap hides the values of its arguments
            if not transformed() and (labels.min() < 0 or labels.max() > self.config.num_classes):
                raise UserError(
                    f"labels: expected 0 .. {self.config.num_classes}, "
                    f"got {int(labels.min())} .. {int(labels.max())}"
                )
        return timesteps, labels

    def _initialise(self) -> None:
        """Initialise as the original: Xavier weights, zero biases, zero outputs of blocks and model."""
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


def _label_dropout(class_dropout_prob: float, given: float | None, has_text: bool) -> float:
    """Return the probability of dropping the label alone; raise UserError for invalid probabilities."""
    limit = 0.5 if has_text and given is None else 1.0
    if not 0 <= class_dropout_prob < limit:
        raise UserError(f"class_dropout_prob: expected a value in [0, {limit:g}), got {class_dropout_prob}")
    if given is None:
        return class_dropout_prob if has_text else 0.0
    if not has_text:
        raise UserError(f"label_dropout_prob: expected None for a model without text_dim, got {given}")
    most = 1 - class_dropout_prob
    if not 0 <= given <= most + 1e-9:
        raise UserError(f"label_dropout_prob: expected a value in [0, {most:g}], got {given}")
    return given


def _shape(value: torch.Tensor | None) -> str:
    return "none" if value is None else str(tuple(value.shape))
