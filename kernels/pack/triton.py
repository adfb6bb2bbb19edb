"""Latents <-> packed tokens in Triton: one launch per batch, with a table of the latents' addresses.

A program moves all channels of a run of one latent's pixels. Latents are dense along x or along channels,
tokens along channels. Where the two differ, Triton transposes the tile in shared memory, so that both sides
are accessed 16 bytes at a time.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..triton_runtime import on_device_of

TILE_BYTES = 4096
"""Bytes that a program moves at a time."""


def pack(latents: Sequence[torch.Tensor], patch_size: int) -> torch.Tensor:
    """Convert (c, h*p, w*p) latents to (T, p*p*c) tokens."""
    first = latents[0]
    count = sum((x.shape[1] // patch_size) * (x.shape[2] // patch_size) for x in latents)
    tokens = torch.empty((count, patch_size**2 * first.shape[0]), dtype=first.dtype, device=first.device)
    _move(latents, tokens, patch_size, packing=True)
    return tokens


def unpack(tokens: torch.Tensor, grids: Sequence[int], patch_size: int) -> list[torch.Tensor]:
    """Convert (T, p*p*c) tokens to (c, h*p, w*p) latents; grids are h0, w0, h1, w1 and so on."""
    channels = tokens.shape[1] // patch_size**2
    latents = [
        torch.empty((channels, h * patch_size, w * patch_size), dtype=tokens.dtype, device=tokens.device)
        for h, w in zip(grids[::2], grids[1::2], strict=True)
    ]
    _move(latents, tokens if tokens.stride(1) == 1 else tokens.contiguous(), patch_size, packing=False)
    return latents


def _move(latents: Sequence[torch.Tensor], tokens: torch.Tensor, patch_size: int, packing: bool) -> None:
    if tokens.numel() == 0:
        return
    rows, first_token, max_pixels = [], 0, 0
    for x in latents:
        h, w = x.shape[1] // patch_size, x.shape[2] // patch_size
        rows.append((x.data_ptr(), *x.stride(), h, w, first_token))
        first_token += h * w
        max_pixels = max(max_pixels, h * w * patch_size)
    channels = latents[0].shape[0]
    block_channels = min(triton.next_power_of_2(channels), 64)
    block_pixels = TILE_BYTES // (tokens.element_size() * block_channels)
    inner, vector = _access(latents)
    # Not pinned: such a copy is staged at once, and pinning a new tensor takes longer than the copy.
    table = torch.tensor(rows, dtype=torch.int64)
    with on_device_of(tokens):
        _move_kernel[(len(latents), triton.cdiv(max_pixels, block_pixels))](
            tokens,
            table.to(tokens.device, non_blocking=True),
            tokens.stride(0),
            CHANNELS=channels,
            PATCH=patch_size,
            PACKING=packing,
            INNER=inner,
            VECTOR=vector,
            COLUMNS=table.shape[1],
            BLOCK_CHANNELS=block_channels,
            BLOCK_PIXELS=block_pixels,
            num_warps=4,
        )


def _access(latents: Sequence[torch.Tensor]) -> tuple[str, int]:
    """Return the dimension that is dense in every latent ("x", "channel" or "none"), and its vector width.

    The width is 16 bytes of elements if all addresses, strides and sizes are multiples of it, else 1.
    """
    vector = 16 // latents[0].element_size()
    if all(x.stride(2) == 1 for x in latents):
        inner, dense = "x", 2
    elif all(x.stride(0) == 1 for x in latents):
        inner, dense = "channel", 0
    else:
        return "none", 1
    aligned = all(
        x.data_ptr() % 16 == 0
        and x.shape[dense] % vector == 0
        and all(stride % vector == 0 for dim, stride in enumerate(x.stride()) if dim != dense)
        for x in latents
    )
    return inner, vector if aligned else 1


# mypy: allow-untyped-defs, allow-incomplete-defs


@triton.jit
def _move_kernel(
    tokens,
    table,
    token_stride,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    PACKING: tl.constexpr,
    INNER: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Move pixels q of one latent, counted over the first pixel row of every row of patches, and those below.

    With a width of W pixels, pixel q is in column q % W, in row q // W of patches, and in token q // p.
    """
    row = table + tl.program_id(0) * COLUMNS
    width = tl.load(row + 5).to(tl.int32) * PATCH
    pixels = tl.load(row + 4).to(tl.int32) * width
    start = tl.program_id(1) * BLOCK_PIXELS
    if start >= pixels:
        return
    element = tokens.dtype.element_ty
    latent = tl.load(row).to(tl.pointer_type(element))
    stride_c, stride_y, stride_x = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    if INNER == "x":
        width, pixels = tl.multiple_of(width, VECTOR), tl.multiple_of(pixels, VECTOR)
        stride_c = tl.multiple_of(stride_c, VECTOR)
        stride_x = 1
    if INNER == "channel":
        stride_x = tl.multiple_of(stride_x, VECTOR)
        stride_c = 1
    stride_y = tl.multiple_of(stride_y, VECTOR)
    latent = tl.multiple_of(latent, VECTOR * element.primitive_bitwidth // 8)
    token = tokens + tl.load(row + 6) * token_stride

    q = (start + tl.arange(0, BLOCK_PIXELS))[None, :]
    in_latent = latent + q // width * (PATCH * stride_y) + q % width * stride_x
    in_tokens = token + q // PATCH * token_stride + q % PATCH * CHANNELS
    for first in range(0, CHANNELS, BLOCK_CHANNELS):
        c = (first + tl.arange(0, BLOCK_CHANNELS))[:, None]
        mask = (c < CHANNELS) & (q < pixels)
        for a in tl.static_range(PATCH):
            x = in_latent + a * stride_y + c * stride_c
            y = in_tokens + a * PATCH * CHANNELS + c
            if PACKING:
                tl.store(y, tl.load(x, mask=mask), mask=mask)
            else:
                tl.store(x, tl.load(y, mask=mask), mask=mask)
