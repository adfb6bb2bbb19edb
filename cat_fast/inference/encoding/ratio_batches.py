"""Images of mixed ratios, encoded in batches of one ratio each."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from cat_fast.tokenizer import NestedAutoencoderKL

Item = TypeVar("Item")


class ToEncode(NamedTuple, Generic[Item]):
    """An image to encode, with what its caller knows it by."""

    item: Item
    pixels: Tensor
    """(3, H, W), of one size for all: uint8, or float in [-1, 1]."""
    ratio: int


def encode_by_ratio(
    tokenizer: NestedAutoencoderKL, images: Iterable[ToEncode[Item]], batch_size: int
) -> Iterator[list[tuple[Item, Tensor]]]:
    """Yield batches of items with their latents: full ones as they fill, the others at the end.

    Each latent is the posterior's mode, (c, h, w) float32 on the CPU.
    """
    waiting: dict[int, list[ToEncode[Item]]] = defaultdict(list)

    def encoded(ratio: int) -> list[tuple[Item, Tensor]]:
        batch = waiting.pop(ratio)
        latents = encode_batch(tokenizer, [image.pixels for image in batch], ratio)
        return [(image.item, latent) for image, latent in zip(batch, latents, strict=True)]

    for image in images:
        waiting[image.ratio].append(image)
        if len(waiting[image.ratio]) == batch_size:
            yield encoded(image.ratio)
    for ratio in list(waiting):
        yield encoded(ratio)


@torch.inference_mode()
def encode_batch(tokenizer: NestedAutoencoderKL, pixels: Sequence[Tensor], ratio: int) -> list[Tensor]:
    """Return the posterior's modes, (c, h, w) float32 on the CPU, of images of one size.

    Args:
        pixels: (3, H, W) of each: uint8, or float in [-1, 1].
    """
    x_BCHW = torch.stack(list(pixels)).to(tokenizer.device)
    if x_BCHW.dtype == torch.uint8:
        x_BCHW = x_BCHW.float().div_(127.5).sub_(1.0)
    z_BCHW = tokenizer.encode(x_BCHW.to(tokenizer.dtype), ratio).latent_dist.mode().float().cpu()
    return [z_CHW.clone() for z_CHW in z_BCHW]  # each its own memory, as safetensors wants it
