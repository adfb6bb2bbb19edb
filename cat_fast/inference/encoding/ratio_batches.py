"""Batched encoding of images with mixed ratios, one ratio per batch."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from cat_fast.integers import to_integer
from cat_fast.tokenizer import NestedAutoencoderKL
from cat_fast.tokenizer.pipeline_config import upcast

Item = TypeVar("Item")


class ImageToEncode(NamedTuple, Generic[Item]):
    """An image to encode and the caller's item that identifies it."""

    item: Item
    pixels: Tensor
    """(3, H, W), the same size for all images: uint8, or float in [-1, 1]."""
    ratio: int


def encode_by_ratio(
    tokenizer: NestedAutoencoderKL, images: Iterable[ImageToEncode[Item]], batch_size: int
) -> Iterator[list[tuple[Item, Tensor]]]:
    """Yield batches of (item, latent): full batches as they fill, partial ones at the end.

    Each latent is the mode of the posterior, (c, h, w) float32 on the CPU.
    """
    waiting: dict[int, list[ImageToEncode[Item]]] = defaultdict(list)

    def encoded(ratio: int) -> list[tuple[Item, Tensor]]:
        batch = waiting.pop(ratio)
        latents = encode_batch(tokenizer, [image.pixels for image in batch], ratio)
        return [(image.item, latent) for image, latent in zip(batch, latents, strict=True)]

    for image in images:
        ratio = to_integer("ratio", image.ratio)
        waiting[ratio].append(image)
        if len(waiting[ratio]) == batch_size:
            yield encoded(ratio)
    for ratio in list(waiting):
        yield encoded(ratio)


@torch.inference_mode()
def encode_batch(tokenizer: NestedAutoencoderKL, pixels: Sequence[Tensor], ratio: int) -> list[Tensor]:
    """Encode images of one size; return the modes of their posteriors, (c, h, w) float32 on the CPU.

    Args:
        pixels: one (3, H, W) tensor per image: uint8, or float in [-1, 1].
    """
    x_BCHW = torch.stack(list(pixels)).to(tokenizer.device)
    if x_BCHW.dtype == torch.uint8:
        x_BCHW = x_BCHW.float().div_(127.5).sub_(1.0)
    with upcast(tokenizer):
        z_BCHW = tokenizer.encode(x_BCHW.to(tokenizer.dtype), ratio).latent_dist.mode().float().cpu()
    return [z_CHW.clone() for z_CHW in z_BCHW]  # safetensors refuses tensors that share memory
