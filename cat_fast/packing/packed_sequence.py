"""`PackedSequence`: latents of several ratios as one run of tokens, without padding.

The tokens of all images are concatenated; ``cu_seqlens`` holds the offset of each image, ``grid`` and
``ratio`` its shape and compression ratio. Labels, timesteps, weights and keys are optional.

    packed = PackedSequence.from_latents(latents, ratios=[8, 32], labels=[3, 7])
    noisy = packed.replace(tokens=packed.tokens + noise)
    latents = noisy.to_latents()
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch

from cat_fast.errors import UserError
from cat_fast.integers import to_integers
from cat_fast.kernels.pack.op import pack, unpack

_OPTIONAL = {"label": torch.int64, "timestep": None, "weight": torch.float32}  # (S,); None allows any dtype
_PER_SEQUENCE = ("grid", "ratio", *_OPTIONAL)  # tensors with one row per sequence


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedSequence:
    """S sequences with T tokens in total.

    Raises:
        UserError: inconsistent fields. Shapes are always checked. The values of ``cu_seqlens`` and ``grid``
            are checked on the CPU only, because reading them from a GPU would synchronize.
    """

    tokens: torch.Tensor
    """(T, C) float; C = patch_size^2 * latent channels, in the order of `cat_fast.kernels.pack.reference`."""
    cu_seqlens: torch.Tensor
    """(S + 1,) int32; sequence s is tokens cu_seqlens[s] to cu_seqlens[s + 1]. It may be empty as padding."""
    grid: torch.Tensor
    """(S, 2) int32; height and width of each sequence in tokens."""
    ratio: torch.Tensor
    """(S,) int32; compression ratio of each latent: 8, 16 or 32."""
    label: torch.Tensor | None = None
    """(S,) int64 class index."""
    timestep: torch.Tensor | None = None
    """(S,) diffusion timestep, integer or float."""
    weight: torch.Tensor | None = None
    """(S,) float32 loss weight of each sequence."""
    key: tuple[str, ...] | None = None
    """S names, for bookkeeping."""
    max_seqlen: int = 0
    """Length of the longest sequence, or a bound above it, kept on the host to avoid device synchronization;
    0 computes it."""

    def __post_init__(self) -> None:
        self._check_shapes()
        if self.cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_values()
        if not self.max_seqlen:
            object.__setattr__(self, "max_seqlen", int(self.cu_seqlens.diff().max()))

    def __len__(self) -> int:
        """Return the number of sequences, S."""
        return self.ratio.shape[0]

    @property
    def num_tokens(self) -> int:
        """Number of tokens, T."""
        return self.tokens.shape[0]

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @classmethod
    def from_latents(
        cls,
        latents: Sequence[torch.Tensor],
        ratios: Sequence[int],
        patch_size: int = 2,
        *,
        labels: Sequence[int] | torch.Tensor | None = None,
        weights: Sequence[float] | torch.Tensor | None = None,
        keys: Sequence[str] | None = None,
    ) -> Self:
        """Pack (c, h, w) latents of the same dtype, device and number of channels, in the given order.

        Raises:
            UserError: no latents, an empty latent, lists of different lengths, or latents `pack` rejects.
        """
        if not latents or len(latents) != len(ratios):
            raise UserError(
                f"expected one ratio per latent, got {len(latents)} latents and {len(ratios)} ratios"
            )
        if empty := [i for i, latent in enumerate(latents) if latent.numel() == 0]:
            raise UserError(
                f"latent {empty[0]}: expected a non-empty (c, h, w), got {_format(latents[empty[0]])}"
            )
        tokens = pack(latents, patch_size)
        device = tokens.device
        grids = [(x.shape[1] // patch_size, x.shape[2] // patch_size) for x in latents]
        lengths = torch.tensor([0] + [h * w for h, w in grids])
        return cls(
            tokens=tokens,
            cu_seqlens=lengths.cumsum(0, dtype=torch.int32).to(device),
            grid=torch.tensor(grids, dtype=torch.int32, device=device),
            ratio=torch.tensor(to_integers("ratios", ratios), dtype=torch.int32, device=device),
            label=None if labels is None else torch.as_tensor(labels, dtype=torch.int64, device=device),
            weight=None if weights is None else torch.as_tensor(weights, dtype=torch.float32, device=device),
            key=None if keys is None else tuple(keys),
            max_seqlen=int(lengths.max()),
        )

    def to_latents(self, patch_size: int = 2) -> list[torch.Tensor]:
        """Return the (c, h, w) latents, in order: the exact inverse of `from_latents`."""
        return unpack(self.tokens, [(h, w) for h, w in self.grid.tolist()], patch_size)

    def split(self) -> list[Self]:
        """Return one PackedSequence per sequence; tokens are views."""
        bounds = self.cu_seqlens.tolist()
        return [self._one(s, begin, end) for s, (begin, end) in enumerate(pairwise(bounds))]

    @classmethod
    def concat(cls, packs: Sequence[Self]) -> Self:
        """Concatenate packs, in order.

        Raises:
            UserError: `packs` is empty, or an optional field is set in some packs only.
        """
        if not packs:
            raise UserError("nothing to concatenate: expected at least one PackedSequence")
        lengths = torch.cat([pack.cu_seqlens.diff() for pack in packs])
        fields: dict[str, Any] = {name: _join(packs, name) for name in _PER_SEQUENCE}
        keys = _join(packs, "key")
        return cls(
            tokens=torch.cat([pack.tokens for pack in packs]),
            cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            key=keys,
            max_seqlen=max(pack.max_seqlen for pack in packs),
            **fields,
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move all tensors to `device`; cast only the tokens to `dtype`."""
        # Copies to the CPU must be complete, because values are checked there.
        non_blocking = device is not None and torch.device(device).type != "cpu"
        moved = {
            name: value.to(device=device, non_blocking=non_blocking)
            for name in ("cu_seqlens", *_PER_SEQUENCE)
            if (value := getattr(self, name)) is not None
        }
        tokens = self.tokens.to(device=device, dtype=dtype, non_blocking=non_blocking)
        return dataclasses.replace(self, tokens=tokens, **moved)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with the given fields changed."""
        if "cu_seqlens" in changes:
            changes.setdefault("max_seqlen", 0)
        return dataclasses.replace(self, **changes)

    def sequence_index(self) -> torch.Tensor:
        """Return the index of the sequence that each token belongs to, (T,) int64."""
        index = torch.arange(len(self), device=self.cu_seqlens.device)
        # output_size avoids a synchronization to compute it on the GPU
        return index.repeat_interleave(self.cu_seqlens.diff(), output_size=self.num_tokens)

    def _one(self, s: int, begin: int, end: int) -> Self:
        rows = {
            name: value[s : s + 1] for name in _PER_SEQUENCE if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(
            self,
            tokens=self.tokens[begin:end],
            cu_seqlens=torch.tensor([0, end - begin], dtype=torch.int32, device=self.cu_seqlens.device),
            key=None if self.key is None else self.key[s : s + 1],
            max_seqlen=end - begin,
            **rows,
        )

    def _check_shapes(self) -> None:
        if self.tokens.ndim != 2 or not self.tokens.is_floating_point():
            raise UserError(f"tokens: expected (T, C) of a float dtype, got {_format(self.tokens)}")
        if self.ratio.ndim != 1 or self.ratio.dtype != torch.int32 or len(self) == 0:
            raise UserError(f"ratio: expected (S,) int32 with S >= 1, got {_format(self.ratio)}")
        for name, shape in (("cu_seqlens", (len(self) + 1,)), ("grid", (len(self), 2))):
            value = getattr(self, name)
            if value.shape != shape or value.dtype != torch.int32:
                raise UserError(f"{name}: expected {shape} int32, got {_format(value)}")
        for name, dtype in _OPTIONAL.items():
            value = getattr(self, name)
            if value is not None and value.shape != self.ratio.shape:
                raise UserError(
                    f"{name}: expected ({len(self)},), one per sequence, got {tuple(value.shape)}"
                )
            if value is not None and dtype not in (None, value.dtype):
                raise UserError(f"{name}: expected {_format_dtype(dtype)}, got {_format(value)}")
        if self.key is not None and len(self.key) != len(self):
            raise UserError(f"key: expected {len(self)}, one per sequence, got {len(self.key)}")

    def _check_values(self) -> None:
        lengths = self.cu_seqlens.diff()
        if self.cu_seqlens[0] != 0 or self.cu_seqlens[-1] != self.num_tokens or (lengths < 0).any():
            raise UserError(
                f"cu_seqlens: expected to increase from 0 to the {self.num_tokens} tokens, "
                f"got {self.cu_seqlens.tolist()}"
            )
        mismatches = (self.grid.prod(1) != lengths).nonzero()
        if len(mismatches):
            s = int(mismatches[0])
            h, w = self.grid[s].tolist()
            raise UserError(
                f"grid: expected {int(lengths[s])} tokens for sequence {s} as in cu_seqlens, got {h} x {w}"
            )
        if self.max_seqlen and self.max_seqlen < int(lengths.max()):
            raise UserError(
                f"max_seqlen: expected at least {int(lengths.max())}, the longest sequence,"
                f" got {self.max_seqlen}"
            )


def _join(packs: Sequence[PackedSequence], name: str) -> Any:
    values = [getattr(pack, name) for pack in packs]
    present = [value for value in values if value is not None]
    if not present:
        return None
    if len(present) < len(values):
        raise UserError(f"cannot concatenate: {name} is set in {len(present)} of {len(values)} packs")
    if isinstance(present[0], tuple):
        return tuple(item for value in present for item in value)
    return torch.cat(present)


def _format(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {_format_dtype(tensor.dtype)}"


def _format_dtype(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
