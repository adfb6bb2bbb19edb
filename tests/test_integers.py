"""Integers of numpy and torch are ratios like Python's, wherever a ratio is accepted."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from cat_fast import DiT, NestedAutoencoderKL, PackedSequence, RatioThresholds
from cat_fast.complexity import (
    ComplexityResult,
    Description,
    average_ratio,
    mean_tokens,
    ratio_mix,
    ratios_within_budget,
    tokens_per_image,
)
from cat_fast.complexity.ratios.policy import RatioChoice, RatioPolicy
from cat_fast.data.images.index import ImageRecord, read_index, write_index
from cat_fast.data.latents.format import LatentEntry
from cat_fast.data.sampling.step_plan import normalise_shares
from cat_fast.errors import UserError
from cat_fast.generator import SampleRequest
from cat_fast.inference.encoding.latent_file import LatentRecord
from cat_fast.inference.encoding.ratio_batches import ImageToEncode, encode_by_ratio
from cat_fast.inference.encoding.shard_plan import EncodeShardsSettings
from cat_fast.integers import as_integer, to_integers

KINDS = {
    "int64": np.int64,
    "uint8": np.uint8,
    "array": np.array,
    "tensor": torch.tensor,
    "int32 tensor": lambda value: torch.tensor(value, dtype=torch.int32),
    "tensor of one": lambda value: torch.tensor([value]),
}
NOT_INTEGERS = [True, np.True_, torch.tensor(True), 8.0, np.float64(8), torch.tensor(8.0), "8", None, [8]]


@pytest.fixture(params=KINDS)
def integer(request):
    return KINDS[request.param]


def hashable(integer):
    return not isinstance(integer(8), np.ndarray)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return NestedAutoencoderKL(
        block_out_channels=(8, 8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_num_layers=1,
        ratios=(8, 16),
    ).eval()


def test_only_integers_are_integers(integer):
    assert as_integer(integer(8)) == 8
    assert type(as_integer(integer(8))) is int
    assert [as_integer(value) for value in NOT_INTEGERS] == [None] * len(NOT_INTEGERS)
    for values in (8, "8", torch.tensor(8), [8.5], np.array([8.0]), [True]):
        with pytest.raises(UserError, match="ratios: expected"):
            to_integers("ratios", values)


@torch.no_grad()
def test_tokenizer(vae, integer, tmp_path):
    x = torch.rand(2, 3, 32, 32)
    z = vae.encode(x, 8).latent_dist.mode()
    assert torch.equal(vae.encode(x, integer(8)).latent_dist.mode(), z)
    assert torch.equal(vae.decode(z, integer(8)).sample, vae.decode(z, 8).sample)
    assert torch.equal(vae(x, integer(8)).sample, vae(x, 8).sample)
    assert torch.equal(vae.reconstruct(x, integer(8), sample_posterior=False)[0], vae(x, 8).sample)
    for ratios in ([integer(8), integer(16)], np.array([8, 16]), torch.tensor([8, 16]), (8, integer(16))):
        posteriors = vae.encode_mixed(x, ratios)
        assert [p.mode().shape[-1] for p in posteriors] == [4, 2]
        decoded = vae.decode_mixed([p.mode()[0] for p in posteriors], ratios)
        torch.testing.assert_close(decoded[0], vae.decode(posteriors[0].mode(), 8).sample[0])
    for value in NOT_INTEGERS[:-2]:
        with pytest.raises(TypeError, match="expected an integer ratio"):
            vae.encode(x, value)
    for value in (integer(8), 8.0):
        with pytest.raises((TypeError, ValueError), match="expected"):
            vae.encode_mixed(x, value)
    with pytest.raises(UserError, match=r"expected an integer, got 8\.5"):
        vae.encode_mixed(x, [8.5, 16])


@pytest.mark.parametrize("sequence", [np.array, torch.tensor, lambda values: list(map(np.int64, values))])
def test_models_built_with_such_ratios_are_saved(vae, sequence, tmp_path):
    arguments = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    arguments |= {
        "ratios": sequence([16, 8]),
        "default_ratio": np.int64(8),
        "encoder_matching": sequence([8]),
    }
    built = NestedAutoencoderKL(**arguments)
    assert built.ratios == (8, 16)
    built.save_pretrained(tmp_path / "vae")
    assert NestedAutoencoderKL.from_pretrained(tmp_path / "vae").fingerprint() == built.fingerprint()

    dit = DiT(hidden_size=16, depth=1, num_heads=2, num_classes=2, in_channels=4, ratios=sequence([8, 16]))
    dit.save_pretrained(tmp_path / "dit")
    assert tuple(DiT.from_pretrained(tmp_path / "dit").config.ratios) == (8, 16)
    packed = PackedSequence.from_latents([torch.zeros(4, 4, 4)] * 2, sequence([8, 16]))
    assert packed.ratio.tolist() == [8, 16]
    with torch.no_grad():
        dit(packed, torch.tensor([1, 1]), torch.tensor([0, 1]))
    with pytest.raises(UserError, match=r"ratios: expected an integer, got 8\.5"):
        PackedSequence.from_latents([torch.zeros(4, 4, 4)], [8.5])


def test_complexity(integer):
    mix = {8: 0.5, 16: 0.5, 32: 0.0}
    assert tokens_per_image(integer(16)) == 256
    assert ratio_mix([integer(8), 16, integer(8), integer(16)]) == mix
    if hashable(integer):
        assert mean_tokens({integer(8): 0.5, integer(16): 0.5}) == mean_tokens(mix)
        assert average_ratio({integer(8): 0.5, integer(16): 0.5}) == average_ratio(mix)
    ratios = [integer(8), integer(16), integer(32)]
    arguments = ([9.0, 5.0, 1.0], 448)
    chosen = ratios_within_budget(*arguments, ratios=ratios, preferred=ratios)
    assert json.dumps(chosen) == json.dumps(ratios_within_budget(*arguments, preferred=[8, 16, 32]))
    assert ratios_within_budget(*arguments, ratios=torch.tensor([8, 32])) == [8, 32, 32]
    scores = [1, 2, 3, 5, 6, 7, 9] * 9
    fit = RatioThresholds.fit(scores, target_ratio=16, tolerance=1.0)
    assert RatioThresholds.fit(scores, target_ratio=integer(16), tolerance=1.0) == fit
    assert RatioThresholds(integer(4), integer(7)) == RatioThresholds(4, 7)
    for value in (integer(12), 8.5, "8", True):
        with pytest.raises(UserError, match="must be one of 8, 16 and 32"):
            tokens_per_image(value)


def test_records_with_such_ratios_are_json(integer, tmp_path):
    policy = RatioPolicy((), fixed=integer(16))
    result = ComplexityResult(Description("a sky"), integer(3), integer(32), expected=3.0)
    image = {"path": "a.png", "caption": "", "has_text": False, "has_faces": False}
    record = ImageRecord(key="a", score=integer(3), ratio=integer(32), **image)
    labelled = RatioPolicy(("ratio",)).ratio_from_labels(record)
    records = [
        RatioChoice(ratio=integer(8), source="ratio", why=""),
        policy.choose([record])[0],
        LatentEntry(key="a", label=integer(1), ratio=integer(8), shape=(4, 2, 2)),
        LatentRecord(ratio=integer(8), size=64, source="a.png"),
        SampleRequest(label=integer(1), ratio=integer(8), grid=(2, 2), seed=integer(0)),
        EncodeShardsSettings(source="photographs", out=Path("out"), ratio=integer(8)),
        result,
        record,
    ]
    ratios = [each.ratio for each in records]
    assert json.dumps([*ratios, labelled]) == json.dumps([8, 16, 8, 8, 8, 8, 32, 32, 32])
    assert policy.fixed.why == "fixed 16x"
    assert Counter(ratios)[8] == 5
    assert json.dumps(asdict(records[4])) == json.dumps(
        {"label": 1, "ratio": 8, "grid": [2, 2], "seed": 0, "text": ""}
    )
    write_index(tmp_path / "index.jsonl", [record])
    assert read_index(tmp_path / "index.jsonl")[0].ratio == 32


def test_batches_and_shares(vae, integer):
    images = [ImageToEncode(i, torch.zeros(3, 32, 32), integer(8)) for i in range(4)]
    batches = list(encode_by_ratio(vae, images, batch_size=2))
    assert [[item for item, _ in batch] for batch in batches] == [[0, 1], [2, 3]]
    if hashable(integer):
        assert normalise_shares({integer(16): 1, integer(8): 3}) == {8: 0.75, 16: 0.25}
