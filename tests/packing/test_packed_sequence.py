"""PackedSequence: lossless packing without padding, and validation of its fields."""

import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.packing import PackedSequence

SHAPES = [(4, 16, 16), (4, 4, 4), (4, 8, 6), (4, 2, 10)]
RATIOS = [8, 32, 16, 16]


def pack(**fields):
    torch.manual_seed(0)
    latents = [torch.randn(shape) for shape in SHAPES]
    fields = {"labels": [3, 1, 4, 1], "weights": [1.0, 0.5, 0, 2], "keys": list("abcd")} | fields
    return latents, PackedSequence.from_latents(latents, RATIOS, **fields)


def test_packing_latents_and_unpacking_them_is_exact():
    latents, packed = pack()
    assert len(packed) == 4
    assert packed.num_tokens == 64 + 4 + 12 + 5  # no padding
    assert packed.cu_seqlens.tolist() == [0, 64, 68, 80, 85]
    assert packed.grid.tolist() == [[8, 8], [2, 2], [4, 3], [1, 5]]
    assert packed.max_seqlen == 64
    for latent, back in zip(latents, packed.to_latents(), strict=True):
        assert torch.equal(latent, back)


def test_split_and_concat_are_inverse():
    _, packed = pack()
    packed = packed.replace(timestep=torch.tensor([7.0, 0.5, 999.0, 3.0]))
    parts = packed.split()
    assert [part.weight.tolist() for part in parts] == [[1.0], [0.5], [0.0], [2.0]]
    assert [part.key for part in parts] == [("a",), ("b",), ("c",), ("d",)]
    assert [part.max_seqlen for part in parts] == [64, 4, 12, 5]
    joined = PackedSequence.concat(parts)
    for name in ("tokens", "cu_seqlens", "grid", "ratio", "label", "timestep", "weight"):
        assert torch.equal(getattr(joined, name), getattr(packed, name)), name
        assert getattr(joined, name).dtype == getattr(packed, name).dtype, name
    assert (joined.key, joined.max_seqlen) == (packed.key, packed.max_seqlen)


def test_sequence_index_gives_the_sequence_of_every_token():
    _, packed = pack()
    assert packed.sequence_index().tolist() == [0] * 64 + [1] * 4 + [2] * 12 + [3] * 5


def test_to_casts_only_the_tokens():
    _, packed = pack()
    half = packed.to(dtype=torch.bfloat16)
    assert half.tokens.dtype == torch.bfloat16
    assert (half.label.dtype, half.cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert half.weight.dtype == torch.float32
    meta = packed.to("meta")
    moved = (meta.tokens, meta.cu_seqlens, meta.grid, meta.ratio, meta.label, meta.weight)
    assert {tensor.device.type for tensor in moved} == {"meta"}
    assert meta.max_seqlen == packed.max_seqlen


def test_replace_validates_the_fields():
    _, packed = pack()
    assert packed.replace(timestep=torch.arange(4)).timestep.tolist() == [0, 1, 2, 3]
    for name, value, message in [
        ("timestep", torch.arange(3), r"timestep: expected \(4,\), one per sequence, got \(3,\)"),
        ("weight", torch.ones(4, 1), r"weight: expected \(4,\), one per sequence, got \(4, 1\)"),
        ("weight", torch.ones(4).double(), r"weight: expected float32, got \(4,\) float64"),
        ("label", torch.ones(4), r"label: expected int64, got \(4,\) float32"),
        ("key", ("a", "b"), "key: expected 4, one per sequence, got 2"),
    ]:
        with pytest.raises(UserError, match=message):
            packed.replace(**{name: value})
    with pytest.raises(UserError, match="cu_seqlens: expected to increase from 0 to the 84 tokens"):
        packed.replace(tokens=packed.tokens[1:])


def test_replacing_cu_seqlens_recomputes_max_seqlen():
    _, packed = pack()
    swapped = packed.replace(
        cu_seqlens=torch.tensor([0, 5, 17, 21, 85], dtype=torch.int32), grid=packed.grid.flip(0)
    )
    assert swapped.max_seqlen == 64


@pytest.mark.parametrize(
    ("latents", "ratios", "message"),
    [
        ([], [], "one ratio per latent"),
        ([torch.zeros(4, 4, 4)], [8, 16], "1 latents and 2 ratios"),
        ([torch.zeros(4, 4, 5)], [8], r"divisible by patch_size 2, got \(4, 4, 5\)"),
        ([torch.zeros(4, 4, 4), torch.zeros(4, 0, 4)], [8, 8], "latent 1: expected a non-empty"),
        ([torch.zeros(4, 4)], [8], r"expected \(c, h, w\)"),
        ([torch.zeros(4, 4, 4), torch.zeros(8, 4, 4)], [8, 8], "latent 1: .* differs in channels"),
        ([torch.zeros(4, 4, 4, dtype=torch.int64)], [8], "float dtype"),
    ],
)
def test_invalid_latents_are_rejected(latents, ratios, message):
    with pytest.raises(UserError, match=message):
        PackedSequence.from_latents(latents, ratios)


def test_inconsistent_fields_are_rejected():
    _, packed = pack()
    with pytest.raises(
        UserError, match=r"grid: expected 4 tokens for sequence 1 as in cu_seqlens, got 2 x 3"
    ):
        packed.replace(grid=torch.tensor([[8, 8], [2, 3], [4, 3], [1, 5]], dtype=torch.int32))
    with pytest.raises(UserError, match=r"grid: expected \(4, 2\) int32, got \(4, 2\) int64"):
        packed.replace(grid=packed.grid.long())
    with pytest.raises(UserError, match="max_seqlen: expected at least 64, the longest sequence, got 63"):
        packed.replace(max_seqlen=63)
    with pytest.raises(UserError, match="label is set in 1 of 2 packs"):
        PackedSequence.concat([packed, packed.replace(label=None)])
    with pytest.raises(UserError, match="not a multiple of patch_size"):
        packed.to_latents(patch_size=3)
