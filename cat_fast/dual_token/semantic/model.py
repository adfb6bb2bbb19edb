"""`SemanticModel`: image -> 32 causal codes -> states of a text encoder, with all its parts in one folder.

image --vision--> (B, 257, C) --causal Q-Former--> (B, 32, D) --codebook--> codes (B, 32)
codes --code decoder--> (B, 32, D) --reverse Q-Former--> states (B, 77, T)
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2VisionConfig, Blip2VisionModel

from cat_fast.dual_token.codebook import Quantized, VectorQuantizer
from cat_fast.dual_token.resize import resize
from cat_fast.dual_token.semantic.causal_qformer import CausalQFormer
from cat_fast.dual_token.semantic.code_decoder import CodeDecoder, cosine_loss
from cat_fast.dual_token.semantic.contrastive import Temperature, info_nce
from cat_fast.dual_token.semantic.reverse_qformer import ReverseQFormer, state_loss
from cat_fast.weights.checked_model import CheckedModel
from cat_fast.weights.fingerprint import fingerprint

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of BLIP-2's input, for colours in [0, 1]."""
STAGES = ("contrastive", "codes")


class ContrastiveLoss(NamedTuple):
    """Result of the first stage."""

    loss: Tensor
    accuracy: Tensor
    """Fraction of images whose own text is the most similar one of the batch."""


class CodeLoss(NamedTuple):
    """Result of the second stage; `loss` is not yet weighted."""

    cosine: Tensor
    """Equation 7."""
    states: Tensor
    """Equation 8."""
    lengths: Tensor
    """Cross-entropy of the number of states."""
    state_cosine: Tensor
    """Mean cosine similarity of predicted and true states, detached."""
    features: Tensor
    """(B, L, C): vectors before quantisation."""
    quantized: Quantized


class SemanticModel(CheckedModel):
    """ViT and Q-Formers of BLIP-2's classes, a codebook, and the decoders of its codes.

    Args:
        vision: arguments of `Blip2VisionConfig`; empty for BLIP-2's ViT-g.
        qformer: arguments of `Blip2QFormerConfig` for the causal Q-Former.
        reverse: likewise for the reverse Q-Former.
        num_queries: number of codes per image.
        code_channels: features of a codebook vector.
        codebook_size: number of codes.
        codebook: `ema` or `gradient`.
        decoder_layers, decoder_heads: of the code decoder.
        num_states: maximum number of text states.
        text_width: features of a text state.
        variable_length: predict the number of states; false if the text encoder pads all texts.
        projection: features of the joint space of the contrastive stage.
        temperature: of the contrastive loss, or its start.
        learned_temperature: train the temperature.
        text_fingerprint: identifies the text encoder whose states the model predicts.
    """

    @register_to_config
    def __init__(
        self,
        vision: Mapping[str, Any] | None = None,
        qformer: Mapping[str, Any] | None = None,
        reverse: Mapping[str, Any] | None = None,
        num_queries: int = 32,
        code_channels: int = 32,
        codebook_size: int = 8192,
        codebook: str = "ema",
        decoder_layers: int = 4,
        decoder_heads: int = 12,
        num_states: int = 77,
        text_width: int = 768,
        variable_length: bool = False,
        projection: int = 256,
        temperature: float = 0.07,
        learned_temperature: bool = True,
        text_fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        # BLIP-2's default of 1e-10 is for weights that are loaded; a ViT trained from scratch stays constant.
        vision = {"initializer_range": 0.02, **(vision or {})}
        self.vision_model = Blip2VisionModel(Blip2VisionConfig(**vision))
        own = Blip2QFormerConfig(
            **{"encoder_hidden_size": self.vision_model.config.hidden_size, **(qformer or {})}
        )
        self.causal = CausalQFormer(own, num_queries)
        width = own.hidden_size
        self.image_projection = nn.Linear(width, projection)
        self.text_projection = nn.Linear(text_width, projection)
        self.contrastive_temperature = Temperature(temperature, learned_temperature)
        self.to_code = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, code_channels))
        self.quantizer = VectorQuantizer(codebook_size, code_channels, codebook)
        self.code_decoder = CodeDecoder(code_channels, width, num_queries, decoder_layers, decoder_heads)
        back = Blip2QFormerConfig(**{"encoder_hidden_size": width, **(reverse or {})})
        self.reverse_qformer = ReverseQFormer(back, num_states, text_width, variable_length)

    @property
    def num_queries(self) -> int:
        return self.causal.query_tokens.shape[1]

    @property
    def codebook_size(self) -> int:
        return self.quantizer.size

    def image_features(self, images: Tensor) -> Tensor:
        """Return features (B, N, C) of images (B, 3, H, W) in [-1, 1], resized to the ViT's square."""
        side: int = self.vision_model.config.image_size  # type: ignore[assignment]
        x = resize(images, (side, side)) / 2 + 0.5
        mean, std = (x.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        return self.vision_model(pixel_values=(x - mean) / std).last_hidden_state

    def causal_embeddings(self, images: Tensor) -> Tensor:
        """Return causal embeddings (B, 32, D) of images (B, 3, H, W) in [-1, 1]."""
        return self.causal(self.image_features(images))

    def embed_images(self, images: Tensor) -> Tensor:
        """Return vectors (B, P) in the joint space, from the final causal embedding."""
        return F.normalize(self.image_projection(self.causal_embeddings(images)[:, -1]).float(), dim=-1)

    def embed_texts(self, texts: Sequence[Tensor]) -> Tensor:
        """Return vectors (B, P) in the joint space of texts, the mean of whose states (n, T) is used."""
        pooled = torch.stack([states.mean(0) for states in texts])
        return F.normalize(self.text_projection(pooled.to(self.dtype)).float(), dim=-1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the codes (B, 32), int64, of images (B, 3, H, W) in [-1, 1]."""
        return self.quantizer.nearest(self.to_code(self.causal_embeddings(images)))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> list[Tensor]:
        """Return the text states (n, T) of each row of codes (B, 32)."""
        states, lengths = self.reverse_qformer(self.code_decoder(self.quantizer.lookup(codes)))
        if lengths is None:
            return list(states)
        return [own[: int(count) + 1] for own, count in zip(states, lengths.argmax(1), strict=True)]

    def forward(
        self, stage: str, images: Tensor, texts: Sequence[Tensor], own: Tensor | None = None
    ) -> ContrastiveLoss | CodeLoss:
        """Return the losses of a training stage.

        Args:
            stage: `contrastive` or `codes`.
            images: (B, 3, H, W) in [-1, 1].
            texts: states (n, T) of each image's text; in the contrastive stage those of all ranks.
            own: (B,) int64, in the contrastive stage: index of each image's text.
        """
        if stage == "contrastive":
            assert own is not None
            embeddings, all_texts = self.embed_images(images), self.embed_texts(texts)
            return ContrastiveLoss(*info_nce(embeddings, all_texts, own, self.contrastive_temperature()))
        with torch.no_grad():
            embeddings = self.causal_embeddings(images)
        features = self.to_code(embeddings)
        quantized = self.quantizer(features)
        decoded = self.code_decoder(quantized.values)
        sizes = torch.tensor([len(own) for own in texts], device=decoded.device)
        states, lengths = self.reverse_qformer(decoded, sizes)
        mse, entropy, similarity = state_loss(states, lengths, texts)
        return CodeLoss(cosine_loss(decoded, embeddings), mse, entropy, similarity, features, quantized)

    def trained_parts(self, stage: str, with_vision: bool) -> list[nn.Module]:
        """Return the modules that a stage trains; the others stay fixed.

        Args:
            with_vision: train the ViT, too, in the contrastive stage, if it is not a pretrained one.
        """
        if stage == "contrastive":
            vision: list[nn.Module] = [self.vision_model] if with_vision else []
            return [
                *vision,
                self.causal,
                self.image_projection,
                self.text_projection,
                self.contrastive_temperature,
            ]
        return [self.to_code, self.quantizer, self.code_decoder, self.reverse_qformer]

    def fingerprint(self) -> str:
        """Return 16 hex digits that identify the weights that codes depend on, and the config."""
        settings = {key: value for key, value in self.config.items() if not key.startswith("_")}
        parts = ("vision_model.", "causal.", "to_code.", "quantizer.codebook")
        state = {name: value for name, value in self.state_dict().items() if name.startswith(parts)}
        return fingerprint(settings, state)
