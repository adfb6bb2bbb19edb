"""Files are read and written while the device computes: it is idle for less than 5 % of the time.

Seconds are those of a fast GPU, of an image of 512 px and of one core; none of them is measured here.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from cat_fast.inference.encoding import codec, ratio_batches
from cat_fast.inference.encoding.codec import decode_file
from cat_fast.inference.encoding.latent_file import LatentRecord, write_latents
from cat_fast.inference.encoding.ratio_batches import ImageToEncode, encode_by_ratio
from cat_fast.inference.sampling_run import run as sampling_run
from cat_fast.inference.sampling_run.run import SampleRun
from tests.cli.conftest import tiny_tokenizer
from tests.fake_device import FakeDevice, Pending

DECODE, SAMPLE, SAVE, PREPARE = 0.030, 0.026, 0.080, 0.002
"""Seconds per image: decoding and sampling on the device, and encoding a PNG and preparing it on the host."""
BATCH, BATCHES = 8, 6


@pytest.fixture
def device(monkeypatch):
    """A fake device, on whose host images take time to save."""
    device = FakeDevice()

    def save(self, path, **options):
        device.work(SAVE)
        Path(path).write_bytes(b"image")

    monkeypatch.setattr(Image.Image, "save", save)
    monkeypatch.setattr(codec, "batches_ahead", lambda _: 1)
    monkeypatch.setattr(ratio_batches, "batches_ahead", lambda _: 1)
    return device


def test_decoding(device, monkeypatch, tmp_path):
    def start(tokenizer, latents, ratio):
        return Pending(device, DECODE * len(latents), torch.zeros(len(latents), 3, 16, 16))

    def to_image(x):
        device.work(PREPARE)
        return Image.new("RGB", (16, 16))

    monkeypatch.setattr(codec, "_start_decoding", start)
    monkeypatch.setattr(codec, "tensor_to_image", to_image)
    tokenizer = tiny_tokenizer(seed=0).eval()
    keys = [f"{number:03}" for number in range(BATCH * BATCHES)]
    record = LatentRecord(ratio=16, size=32, source="a.png")
    latents = {key: torch.zeros(tokenizer.config["latent_channels"], 2, 2) for key in keys}
    file = tmp_path / "latents.safetensors"
    write_latents(file, latents, dict.fromkeys(keys, record), tokenizer=tokenizer.fingerprint(), made_with={})
    decoded = decode_file(file, tmp_path / "out", tokenizer=tokenizer, batch_size=BATCH)
    assert len(list((tmp_path / "out").glob("*.png"))) == len(decoded) == BATCH * BATCHES
    assert device.busy == pytest.approx(DECODE * BATCH * BATCHES)
    assert device.idle_share < 0.05


def test_encoding(device, monkeypatch):
    monkeypatch.setattr(
        ratio_batches, "_start",
        lambda tokenizer, pixels, ratio: Pending(device, DECODE * len(pixels), torch.zeros(len(pixels), 4)),
    )  # fmt: skip
    monkeypatch.setattr(ratio_batches, "_finish", lambda z: list(z.cpu()))

    def images():
        for number in range(BATCH * BATCHES):
            device.work(PREPARE)
            yield ImageToEncode(number, torch.zeros(3, 16, 16), 16)

    tokenizer = SimpleNamespace(device=torch.device("cpu"))
    assert sum(map(len, encode_by_ratio(tokenizer, images(), BATCH))) == BATCH * BATCHES
    assert device.idle_share < 0.05


def test_sampling(device, monkeypatch, tmp_path):
    def draw(requests, **options):
        done = device.launch(SAMPLE * len(requests))
        device.wait(done)  # images arrive on the host
        device.work(0.0002 * len(requests))
        return [Image.new("RGB", (16, 16)) for _ in requests]

    for name in ("claim_folder", "describe_execution", "write_json"):
        monkeypatch.setattr(sampling_run, name, lambda *arguments: {})
    run = object.__new__(SampleRun)
    run.pipeline = SimpleNamespace(
        draw=draw, device=torch.device("cpu"), dtype=torch.float32, decode_tier="exact"
    )
    run.settings, run.folder = sampling_run.SampleSettings(), tmp_path
    run.requests = list(range(BATCH * BATCHES))
    run.batches = [run.requests[i : i + BATCH] for i in range(0, len(run.requests), BATCH)]
    run._plan = {}
    (tmp_path / "images").mkdir()
    assert run.draw() == BATCH * BATCHES
    assert device.idle_share < 0.05
