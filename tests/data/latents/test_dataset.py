"""Latent shards: round trip, resuming after a kill, damage, and rejection of other tokenizers."""

import json
import pickle

import pytest
import torch
from safetensors import SafetensorError

from cat_fast.data import files
from cat_fast.data.latents import shard_file
from cat_fast.data.latents.dataset import LatentDataset, LatentShardWriter
from cat_fast.data.latents.moments import Moments, per_channel
from cat_fast.data.latents.scale import LatentScale
from cat_fast.data.ratio_origin import RatioOrigin
from cat_fast.errors import UserError

NAMES = ["sky", "street", "page"]
SIDES = {8: 16, 16: 8, 32: 4}


def make_latents(count):
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        ratio = (8, 16, 32)[i % 3]
        yield (
            f"photo-{i:02d}",
            3 + 2 * torch.randn(4, SIDES[ratio], SIDES[ratio], generator=generator),
            i % 3,
            ratio,
        )


def open_writer(folder, fingerprint="abc", **changes):
    options = {"resolution": 128, "class_names": NAMES, "latents_per_shard": 4} | changes
    return LatentShardWriter(folder, fingerprint, **options)


def write(folder, count=10, stop_before=None):
    """Write latents like an encoding run; raise KeyboardInterrupt before latent `stop_before`."""
    encoded = []
    with open_writer(folder) as writer:
        for i, (key, latent, label, ratio) in enumerate(make_latents(count)):
            if i == stop_before:
                raise KeyboardInterrupt
            if key not in writer:
                writer.add(key, latent, label=label, ratio=ratio, caption=f"caption {i}")
                encoded.append(key)
    return encoded


def assert_complete(folder, count=10):
    dataset = LatentDataset(folder, "abc")
    expected = {key: (latent, label, ratio) for key, latent, label, ratio in make_latents(count)}
    assert sorted(entry.key for entry in dataset.entries) == sorted(expected)  # exactly once
    for sample in (dataset[i] for i in range(len(dataset))):
        latent, label, ratio = expected[sample.key]
        assert (sample.label, sample.ratio) == (label, ratio)
        restored = sample.latent / per_channel(dataset.scaling_factor) + per_channel(dataset.shift_factor)
        torch.testing.assert_close(restored, latent)


def test_latents_make_the_round_trip(tmp_path):
    write(tmp_path)
    assert_complete(tmp_path)
    dataset = LatentDataset(tmp_path)
    assert (dataset.fingerprint, dataset.resolution, dataset.class_names) == ("abc", 128, NAMES)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3  # 4 + 4 + 2
    assert dataset.entries[1].caption == "caption 1"
    assert dataset.token_counts(patch_size=2)[:4] == [64, 16, 4, 64]


@pytest.mark.parametrize("normalized", ["per_channel", "per_ratio"])
def test_latents_are_normalized_with_the_same_weight_for_every_image(tmp_path, normalized):
    write(tmp_path, count=30)
    dataset = LatentDataset(tmp_path, normalized=normalized)
    seen = Moments.by_group((sample.ratio, sample.latent) for sample in map(dataset.__getitem__, range(30)))
    expected = Moments.by_group((ratio, latent) for _, latent, _, ratio in make_latents(30))
    assert {ratio: moments.count for ratio, moments in dataset.moments.items()} == {8: 10, 16: 10, 32: 10}
    for ratio, moments in expected.items():
        assert dataset.moments[ratio].mean == pytest.approx(moments.mean, rel=1e-9)
        assert dataset.moments[ratio].std == pytest.approx(moments.std, rel=1e-9)
    for moments in seen.values() if normalized == "per_ratio" else [Moments.merge(seen.values())]:
        assert moments.mean == pytest.approx([0.0] * 4, abs=1e-5)
        assert moments.std == pytest.approx([1.0] * 4, rel=1e-5)
    if normalized == "per_ratio":
        assert dataset.scaling_factor == {
            str(ratio): pytest.approx([1 / std for std in moments.std]) for ratio, moments in expected.items()
        }


OWN = {"shift_factor": [0.5, 0.0, 0.0, -1.0], "scaling_factor": [0.2, 0.2, 0.5, 2.0]}


@pytest.mark.parametrize("normalized", ["none", False])
def test_without_normalization_the_scale_is_the_tokenizers_own(tmp_path, normalized):
    with open_writer(tmp_path / "own", scale=LatentScale(**OWN)) as writer:
        for key, latent, label, ratio in make_latents(3):
            writer.add(key, latent, label=label, ratio=ratio)
    dataset = LatentDataset(tmp_path / "own", normalized=normalized)
    assert {"shift_factor": dataset.shift_factor, "scaling_factor": dataset.scaling_factor} == OWN
    shift, scale = (torch.tensor(values).view(4, 1, 1) for values in OWN.values())
    for i, (_, latent, _, _) in enumerate(make_latents(3)):
        torch.testing.assert_close(dataset[i].latent, (latent - shift) * scale)
    given = LatentDataset(tmp_path / "own", normalized=normalized, tokenizer_scale=LatentScale(0.0, 3.0))
    torch.testing.assert_close(given[0].latent, 3 * next(iter(make_latents(1)))[1])
    with pytest.raises(UserError, match=r"made with other settings .*scale"):
        open_writer(tmp_path / "own")

    write(tmp_path / "cat")  # a scaling factor of 1, as CAT's
    dataset = LatentDataset(tmp_path / "cat", normalized=normalized)
    assert (dataset.shift_factor, dataset.scaling_factor) == ([0.0] * 4, [1.0] * 4)
    assert torch.equal(dataset[0].latent, next(iter(make_latents(1)))[1])


def test_folders_of_an_earlier_version_are_read_again_for_their_statistics(tmp_path, caplog):
    """Their records hold moments that are pooled by values over all ratios, and no scale of the tokenizer."""
    write(tmp_path)
    expected = {kind: LatentDataset(tmp_path, normalized=kind) for kind in ("per_channel", "per_ratio")}
    for path in tmp_path.glob("*.json"):
        content = json.loads(path.read_text())
        content.pop("scale", None)
        if content.pop("moments_by_ratio", None):
            content["moments"] = {"count": 340, "mean": [3.0] * 4, "squares": [999.0] * 4}
        path.write_text(json.dumps(content))
    for kind, dataset in expected.items():
        again = LatentDataset(tmp_path, normalized=kind)
        assert again.scale == dataset.scale
        assert again.digest == dataset.digest
    assert "3 shards were encoded by an earlier version; reading their latents" in caplog.text
    with pytest.raises(UserError, match=r"does not record the scaling factor .* set data\.tokenizer"):
        LatentDataset(tmp_path, normalized="none")
    assert (
        LatentDataset(tmp_path, normalized="none", tokenizer_scale=LatentScale(0.0, 3.0)).scaling_factor == 3
    )
    assert write(tmp_path) == []  # and encoding resumes


def test_the_reach_of_latents_is_in_the_scale_of_the_dit(tmp_path):
    write(tmp_path, count=30)
    for normalized, low, high in (("none", 10, 13), ("per_channel", 3.5, 4.6)):
        reach = LatentDataset(tmp_path, normalized=normalized).reach()
        assert reach.keys() == {8, 16, 32}
        assert all(low < value < high for value in reach.values())


@pytest.mark.parametrize("stop_before", [1, 4, 6, 9])
def test_an_interrupted_run_resumes_without_duplicates(tmp_path, stop_before):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, stop_before=stop_before)
    complete = stop_before // 4 * 4
    assert len(write(tmp_path)) == 10 - complete  # complete shards are not encoded again
    assert_complete(tmp_path)
    assert write(tmp_path) == []


def test_a_truncated_shard_is_reported_and_rewritten(tmp_path):
    write(tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is damaged: \d+ of \d+ bytes"):
        LatentDataset(tmp_path)
    assert write(tmp_path) == [f"photo-{i:02d}" for i in range(4, 8)]
    assert_complete(tmp_path)


def test_a_shard_without_a_record_is_ignored_and_rewritten(tmp_path):
    """The process was killed after the shard and before its record."""
    write(tmp_path)
    (tmp_path / "shard-00002.json").unlink()
    assert len(LatentDataset(tmp_path)) == 8
    assert write(tmp_path) == ["photo-08", "photo-09"]
    assert_complete(tmp_path)


def test_the_record_of_a_lost_shard_does_not_validate_the_next_one(tmp_path, monkeypatch):
    """The process is killed after the shard and before its record."""
    write(tmp_path)
    shard = tmp_path / "shard-00001.safetensors"
    shard.unlink()

    def killed(path, values):
        raise KeyboardInterrupt

    with monkeypatch.context() as fault:
        fault.setattr(shard_file, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path)
    assert shard.is_file()
    assert len(LatentDataset(tmp_path)) == 6
    assert write(tmp_path) == [f"photo-{i:02d}" for i in range(4, 8)]
    assert_complete(tmp_path)


def test_origins_of_ratios_are_counted_over_all_shards(tmp_path):
    fixed, by_size = RatioOrigin(source="fixed"), RatioOrigin(source="jpeg size", jpeg_thresholds=(1, 2))
    with open_writer(tmp_path) as writer:
        for i, (key, latent, label, ratio) in enumerate(make_latents(10)):
            more = {} if i % 3 else {"origin": by_size}
            writer.add(key, latent, label=label, ratio=ratio, **more)
    assert LatentDataset(tmp_path).origins == {fixed: 6, by_size: 4}


def test_a_missing_shard_is_reported(tmp_path):
    write(tmp_path)
    (tmp_path / "shard-00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard-00000\.safetensors is missing"):
        LatentDataset(tmp_path)


def test_a_shard_with_changed_content_is_reported(tmp_path):
    write(tmp_path)
    shard = tmp_path / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 0xFF
    shard.write_bytes(content)
    dataset = LatentDataset(tmp_path)
    dataset[0]
    with pytest.raises(UserError, match=r"shard-00002\.safetensors is damaged"):
        dataset[9]
    LatentDataset(tmp_path, verify=False)[9]
    for rank in range(2):  # one of two ranks finds it
        shared = LatentDataset(tmp_path, part=(rank, 2))
        if rank == 0:
            with pytest.raises(UserError, match=r"shard-00002\.safetensors is damaged"):
                shared[9]
        else:
            shared[9]


def test_latents_of_another_tokenizer_are_rejected(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="expected latents of tokenizer xyz, got abc"):
        LatentDataset(tmp_path, "xyz")
    with pytest.raises(UserError, match="fingerprint: 'abc', not 'xyz'"):
        open_writer(tmp_path, "xyz")
    with pytest.raises(UserError, match="resolution: 128, not 256"):
        open_writer(tmp_path, resolution=256)


def test_a_concurrent_writer_with_other_settings_is_rejected(tmp_path, monkeypatch):
    """The other writer creates the header after this one has checked for it."""
    created = files._create_part

    def create_late(path):
        monkeypatch.setattr(files, "_create_part", created)
        open_writer(tmp_path, "abc")
        return created(path)

    monkeypatch.setattr(files, "_create_part", create_late)
    with pytest.raises(UserError, match="fingerprint: 'abc', not 'xyz'"):
        open_writer(tmp_path, "xyz")
    assert json.loads((tmp_path / "latents.json").read_text())["fingerprint"] == "abc"
    assert [path.name for path in tmp_path.iterdir()] == ["latents.json"]


def test_a_full_disk_raises_an_error_and_loses_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as fault:
        fault.setattr(shard_file, "save_file", full)
        with pytest.raises(UserError, match=r"shard-00000\.safetensors: cannot be written .*No space left"):
            write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["latents.json"]
    write(tmp_path)
    assert_complete(tmp_path)


def test_folders_without_latents_are_rejected(tmp_path):
    with pytest.raises(UserError, match="contains no latents"):
        LatentDataset(tmp_path)
    open_writer(tmp_path)
    with pytest.raises(UserError, match="no complete shard"):
        LatentDataset(tmp_path)
    (tmp_path / "latents.json").write_text('{"fingerp')
    with pytest.raises(UserError, match=r"latents\.json cannot be read"):
        LatentDataset(tmp_path)


def test_invalid_latents_are_rejected(tmp_path):
    writer = open_writer(tmp_path)
    latent = torch.zeros(4, 8, 8)
    writer.add("a", latent, label=0, ratio=16)
    with pytest.raises(UserError, match="'a' exists already"):
        writer.add("a", latent, label=0, ratio=16)
    with pytest.raises(UserError, match="'b': expected finite"):
        writer.add("b", torch.full((4, 8, 8), float("nan")), label=0, ratio=16)
    with pytest.raises(UserError, match="expected a label below 3, got 3"):
        writer.add("b", latent, label=3, ratio=16)


def test_the_dataset_can_be_pickled_for_loader_workers(tmp_path):
    write(tmp_path)
    dataset = LatentDataset(tmp_path)
    first = dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[0].latent, first.latent)


def test_the_record_lists_the_latents_of_a_shard(tmp_path):
    write(tmp_path)
    record = json.loads((tmp_path / "shard-00000.json").read_text())
    assert record["latents"][2] == {
        "key": "photo-02", "label": 2, "ratio": 32, "shape": [4, 4, 4], "caption": "caption 2",
    }  # fmt: skip
