"""Latents for training the DiT: number per image and ratio, and resumption after an interruption."""

from collections import Counter

import pytest
import torch

from cat_fast.complexity.ratios.image_ratios import index_photographs
from cat_fast.data.images.random_crop import random_crop
from cat_fast.data.latents.dataset import LatentDataset
from cat_fast.data.latents.moments import per_channel
from cat_fast.data.photographs import CATEGORIES, photographs
from cat_fast.demo.latents import encode_crops
from cat_fast.demo.metrics import latent_deviations
from tests.cli.conftest import tiny_tokenizer

CROPS = 4


@pytest.fixture(scope="module")
def records():
    return index_photographs(photographs("train")[:3])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def encode(tokenizer, records, folder, **changes):
    encode_crops(tokenizer, records, folder, **{"resolution": 64, "crops": CROPS} | changes)


def latents(folder) -> dict[str, torch.Tensor]:
    dataset = LatentDataset(folder)
    raw = {}
    for number, entry in enumerate(dataset.entries):
        scaled = dataset[number].latent / per_channel(dataset.scaling_factor)
        raw[entry.key] = scaled + per_channel(dataset.shift_factor)
    return raw


def test_image_gets_all_crops_at_its_own_ratio_and_half_at_the_others(tokenizer, records, tmp_path):
    encode(tokenizer, records, tmp_path)
    dataset = LatentDataset(tmp_path, tokenizer.fingerprint())
    for record in records:
        entries = [e for e in dataset.entries if e.key.startswith(f"{record.key}-")]
        expected = {f: CROPS if f == record.ratio else CROPS // 2 for f in (8, 16, 32)}
        assert Counter(e.ratio for e in entries) == expected
        assert {CATEGORIES[e.label] for e in entries} == {record.category}
        assert {e.caption for e in entries} == {record.caption}
        assert all(e.shape == (4, 64 // e.ratio, 64 // e.ratio) for e in entries)
    assert dataset.class_names == list(CATEGORIES)
    assert dataset.resolution == 64


def test_the_deviation_of_each_ratio_is_measured(tokenizer, records, tmp_path):
    encode(tokenizer, records, tmp_path)
    by_ratio = {8: [], 16: [], 32: []}
    for key, latent in latents(tmp_path).items():
        by_ratio[int(key.rsplit("-", 2)[1][:-1])].append(latent.double())
    measured = latent_deviations(tmp_path)
    for ratio, members in by_ratio.items():
        mean = torch.stack([latent.mean((1, 2)) for latent in members]).mean(0)
        deviations = [(latent - mean.view(-1, 1, 1)).square().mean((1, 2)) for latent in members]
        variance = torch.stack(deviations).mean(0)
        found = measured[str(ratio)]
        assert found["count"] == len(members)
        assert found["std"] == pytest.approx(variance.mean().sqrt().item(), rel=1e-4)
        assert found["std_of_channels"] == pytest.approx(variance.sqrt().tolist(), rel=1e-4)


def test_each_crop_has_random_numbers_of_its_own(tokenizer, records, tmp_path, monkeypatch):
    drawn = []

    def recorded(image, rng, *settings):
        drawn.append(rng.random())
        return random_crop(image, rng, *settings)

    monkeypatch.setattr("cat_fast.demo.latents.random_crop", recorded)
    encode(tokenizer, records, tmp_path)
    assert len(set(drawn)) == len(drawn) == len(records) * (CROPS + 2 * CROPS // 2)
    values = list(latents(tmp_path).values())
    assert len({v.mean().item() for v in values}) == len(values)


def test_resumed_run_equals_an_uninterrupted_one(tokenizer, records, tmp_path):
    class Interruption(Exception):
        pass

    def interrupt():
        raise Interruption

    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    encode(tokenizer, records, uninterrupted)
    encode(tokenizer, records[:1], resumed)
    with pytest.raises(Interruption):
        encode(tokenizer, records, resumed, on_done=interrupt)
    before = {p.name: p.read_bytes() for p in resumed.glob("shard-00000.*")}
    encode(tokenizer, records, resumed)
    assert {name: (resumed / name).read_bytes() for name in before} == before, "existing shards are kept"
    expected, found = latents(uninterrupted), latents(resumed)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-4)


def test_finished_run_encodes_nothing_and_still_reports_progress(tokenizer, records, tmp_path, monkeypatch):
    encode(tokenizer, records, tmp_path)
    monkeypatch.setattr(type(tokenizer), "encode", lambda *_: pytest.fail("encoded again"))
    reports = []
    encode(tokenizer, records, tmp_path, on_done=lambda: reports.append(1))
    assert len(reports) == len(records)
