"""Classification head of the paper (appendix F): linear, on latents padded with zeros to the length of 8x."""

from pathlib import Path

from torch import Tensor, nn

from cat_fast.evaluation.classification.features import features_of
from cat_fast.models.load import load_tokenizer
from cat_fast.tokenizer import NestedAutoencoderKL


class Probe(nn.Module):
    """Linear head, and for fine-tuning the encoder below it.

    Args:
        width: number of features per image.
        num_classes: number of classes.
        tokenizer: folder of the tokenizer to fine-tune; None for features as inputs.
        pooled: features of an image are its mean latent.
    """

    def __init__(self, width: int, num_classes: int, tokenizer: Path | None, pooled: bool) -> None:
        super().__init__()
        self.width, self.pooled = width, pooled
        self.head = nn.Linear(width, num_classes)
        self.tokenizer: NestedAutoencoderKL | None = None
        if tokenizer is not None:
            self.tokenizer = load_tokenizer(tokenizer, "cpu").float()
            self.tokenizer.decoder.requires_grad_(False)
            self.tokenizer.post_quant_conv.requires_grad_(False)

    def forward(self, inputs: Tensor, ratios: Tensor) -> Tensor:
        """Return logits (B, classes).

        Args:
            inputs: features (B, width), or images (B, 3, H, W) uint8 for fine-tuning.
            ratios: (B,), the ratio of each image; ignored for features.
        """
        if self.tokenizer is None:
            return self.head(inputs.float())
        x = inputs.float() / 127.5 - 1
        features = x.new_zeros(len(x), self.width)
        unused = x.new_zeros(())
        for ratio in self.tokenizer.ratios:
            rows = (ratios == ratio).nonzero().flatten()
            # Without an image at a ratio, one of zeros gives its layers gradients of zero on every rank.
            images = x[rows] if len(rows) else x.new_zeros(1, 3, 2 * ratio, 2 * ratio)
            latents = self.tokenizer.encode(images, ratio).latent_dist.mode()
            if len(rows):
                features = features.index_copy(0, rows, features_of(latents, self.width, self.pooled))
            else:
                unused = unused + 0.0 * latents.sum()
        return self.head(features) + unused
