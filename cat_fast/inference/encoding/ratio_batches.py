"""Batched encoding of images with mixed ratios, one ratio per batch."""

from collections import defaultdict, deque
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

    Each latent is the mode of the posterior, (c, h, w) float32 on the CPU. A GPU encodes a batch while the
    next one is collected, and the results of the one before are read.
    """
    waiting: dict[int, list[ImageToEncode[Item]]] = defaultdict(list)
    running: deque[tuple[list[ImageToEncode[Item]], Tensor]] = deque()
    ahead = batches_ahead(tokenizer.device)

    def start(ratio: int) -> None:
        batch = waiting.pop(ratio)
        running.append((batch, _start(tokenizer, [image.pixels for image in batch], ratio)))

    def finish() -> list[tuple[Item, Tensor]]:
        batch, z_BCHW = running.popleft()
        return [(image.item, latent) for image, latent in zip(batch, _finish(z_BCHW), strict=True)]

    for image in images:
        ratio = to_integer("ratio", image.ratio)
        waiting[ratio].append(image)
        if len(waiting[ratio]) == batch_size:
            start(ratio)
            while len(running) > ahead:
                yield finish()
    for ratio in list(waiting):
        start(ratio)
        while len(running) > ahead:
            yield finish()
    while running:
        yield finish()


def encode_batch(tokenizer: NestedAutoencoderKL, pixels: Sequence[Tensor], ratio: int) -> list[Tensor]:
    """Encode images of one size; return the modes of their posteriors, (c, h, w) float32 on the CPU.

    Args:
        pixels: one (3, H, W) tensor per image: uint8, or float in [-1, 1].
    """
    return _finish(_start(tokenizer, pixels, ratio))


def batches_ahead(device: torch.device) -> int:
    """Return the number of batches to start before the results of an earlier one are read."""
    return 0 if device.type == "cpu" else 1


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host without waiting for the device."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


@torch.inference_mode()
def _start(tokenizer: NestedAutoencoderKL, pixels: Sequence[Tensor], ratio: int) -> Tensor:
    """Return the modes of the posteriors, float32 on the tokenizer's device, without waiting for it."""
    x_BCHW = to_device(torch.stack(list(pixels)), tokenizer.device)
    if x_BCHW.dtype == torch.uint8:
        x_BCHW = x_BCHW.float().div_(127.5).sub_(1.0)
    with upcast(tokenizer):
        return tokenizer.encode(x_BCHW.to(tokenizer.dtype), ratio).latent_dist.mode().float()


@torch.inference_mode()
def _finish(z_BCHW: Tensor) -> list[Tensor]:
    return [z_CHW.clone() for z_CHW in z_BCHW.cpu()]  # safetensors refuses tensors that share memory
