"""Latents <-> packed tokens: `pack` and `unpack` run on the best available backend.

Each is the gradient of the other. Derivatives beyond gradients are computed through the reference.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from cat_fast.errors import UserError

from .. import backends
from ..registration import Operator
from .reference import pack_reference, unpack_reference


def pack(latents: Sequence[torch.Tensor], patch_size: int) -> torch.Tensor:
    """Cut latents into p x p patches and concatenate the tokens of all latents.

    latents: (c, h_i*p, w_i*p), of one channel count, dtype and device, with any strides. Returns tokens
    (T, p*p*c) of that dtype, where T is the sum of h_i*w_i. Patches run row by row; the features of a token
    are ordered (row in patch, column in patch, channel). Values are only moved, so autocast has no effect.

    Raises UserError if `latents` is empty, or if they differ in channels, dtype or device. Also raises it
    for latents that are not three-dimensional or have sides that the patch size does not divide.
    """
    _check_latents(latents, patch_size)
    backend = backends.choose("pack", latents[0])
    if backend == "reference":
        return pack_reference(latents, patch_size)
    return PACK(backend, list(latents), patch_size)


def unpack(tokens: torch.Tensor, grids: Sequence[tuple[int, int]], patch_size: int) -> list[torch.Tensor]:
    """Invert `pack`: return a contiguous (c, h_i*p, w_i*p) latent for each grid (h_i, w_i).

    tokens: (T, p*p*c), with any strides, where T is the sum of h_i*w_i.

    Raises UserError if p*p does not divide the features, or if the grids do not add up to T tokens.
    """
    _check_tokens(tokens, grids, patch_size)
    backend = backends.choose("pack", tokens)
    if backend == "reference":
        return unpack_reference(tokens, grids, patch_size)
    return UNPACK(backend, tokens, list(chain.from_iterable(grids)), patch_size)


def _check_latents(latents: Sequence[torch.Tensor], patch_size: int) -> None:
    _check_patch_size(patch_size)
    if not latents:
        raise UserError("nothing to pack: expected at least one latent")
    first = latents[0]
    for i, latent in enumerate(latents):
        if latent.ndim != 3 or latent.shape[1] % patch_size or latent.shape[2] % patch_size:
            raise UserError(
                f"latent {i}: expected (c, h, w) with sides divisible by patch_size {patch_size}, "
                f"got {tuple(latent.shape)}"
            )
        if (latent.shape[0], latent.dtype, latent.device) != (first.shape[0], first.dtype, first.device):
            raise UserError(
                f"latent {i}: {_format_tensor(latent)} differs in channels, dtype or device from the first, "
                f"{_format_tensor(first)}"
            )


def _check_tokens(tokens: torch.Tensor, grids: Sequence[tuple[int, int]], patch_size: int) -> None:
    _check_patch_size(patch_size)
    if tokens.ndim != 2:
        raise UserError(f"tokens: expected (T, p*p*c), got {tuple(tokens.shape)}")
    if tokens.shape[1] % patch_size**2:
        raise UserError(
            f"tokens have {tokens.shape[1]} features, not a multiple of patch_size^2 = {patch_size**2}; "
            "pass the patch_size that they were packed with"
        )
    count = sum(h * w for h, w in grids)
    if not grids or count != tokens.shape[0] or any(h < 0 or w < 0 for h, w in grids):
        raise UserError(
            f"grids: expected sizes (h, w) with {tokens.shape[0]} tokens in total, got {list(grids)}"
        )


def _check_patch_size(patch_size: int) -> None:
    if patch_size < 1:
        raise UserError(f"patch_size: expected at least 1, got {patch_size}")


def _format_tensor(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _fake_pack(latents: Sequence[torch.Tensor], patch_size: int) -> torch.Tensor:
    count = sum((x.shape[1] // patch_size) * (x.shape[2] // patch_size) for x in latents)
    return latents[0].new_empty(count, patch_size**2 * latents[0].shape[0])


def _fake_unpack(tokens: torch.Tensor, grids: Sequence[int], patch_size: int) -> list[torch.Tensor]:
    channels = tokens.shape[1] // patch_size**2
    return [
        tokens.new_empty(channels, h * patch_size, w * patch_size)
        for h, w in zip(grids[::2], grids[1::2], strict=True)
    ]


def _grids(latents: Sequence[torch.Tensor], patch_size: int) -> list[int]:
    return [side // patch_size for latent in latents for side in latent.shape[1:]]


def _setup_pack(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    latents, ctx.patch_size = inputs
    ctx.grids = _grids(latents, ctx.patch_size)


def _setup_unpack(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    _tokens, _grids, ctx.patch_size = inputs


def _backward_pack(unpack: Any, ctx: Any, grad: torch.Tensor) -> tuple[list[torch.Tensor], None]:
    return unpack(grad, ctx.grids, ctx.patch_size), None


def _backward_unpack(pack: Any, ctx: Any, grads: list[torch.Tensor]) -> tuple[torch.Tensor, None, None]:
    return pack(grads, ctx.patch_size), None, None


def _reference_backward_pack(ctx: Any, grad: torch.Tensor) -> tuple[list[torch.Tensor], None]:
    grids = list(zip(ctx.grids[::2], ctx.grids[1::2], strict=True))
    return unpack_reference(grad, grids, ctx.patch_size), None


def _reference_backward_unpack(ctx: Any, grads: list[torch.Tensor]) -> tuple[torch.Tensor, None, None]:
    return pack_reference(grads, ctx.patch_size), None, None


def _triton() -> Any:
    from . import triton

    return triton


PACK = Operator(
    name="pack",
    adjoint="unpack",
    fake=_fake_pack,
    setup_context=_setup_pack,
    backward=_backward_pack,
    reference_backward=_reference_backward_pack,
)
UNPACK = Operator(
    name="unpack",
    adjoint="pack",
    fake=_fake_unpack,
    setup_context=_setup_unpack,
    backward=_backward_unpack,
    reference_backward=_reference_backward_unpack,
)
PACK.register_compiled()
UNPACK.register_compiled()
PACK.register_triton(lambda: (_triton().pack,))
UNPACK.register_triton(lambda: (_triton().unpack,))
