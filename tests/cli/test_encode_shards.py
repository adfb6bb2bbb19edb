"""`cat-fast encode-shards` end to end: from images to latents for training a DiT."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from cat_fast.complexity.ratios.image_ratios import load_index
from cat_fast.data.images.io import image_to_tensor, load_image, resize_center_crop
from cat_fast.data.latents.dataset import LatentDataset
from cat_fast.data.latents.moments import per_channel
from cat_fast.tokenizer import NestedAutoencoderKL
from tests.cli.conftest import assert_one_line_error, parse_json, tiny_tokenizer

ROOT = Path(__file__).parents[2]


def test_photographs_are_encoded_once(cat_fast, checkpoint, tmp_path):
    out = tmp_path / "latents"
    command = ["encode-shards", "photographs", "-c", checkpoint, "-o", out, "--size", 64]
    summary = parse_json(cat_fast(*command, "--per-shard", 16, "--json"))
    records = load_index("photographs")
    data = LatentDataset(out, NestedAutoencoderKL.from_pretrained(checkpoint).fingerprint())
    assert [(e.key, data.class_names[e.label], e.ratio, e.caption) for e in data.entries] == [
        (r.key, r.category, r.ratio, r.caption) for r in records
    ]
    assert summary["latents"] == summary["encoded_now"] == len(records)
    assert summary["ratios"] == {str(f): n for f, n in sorted(Counter(r.ratio for r in records).items())}
    assert summary["mean_tokens"] == pytest.approx(np.mean(data.token_counts()))
    assert summary["tokenizer"] == data.fingerprint

    again = cat_fast(*command, "--per-shard", 16)
    assert again.exit_code == 0
    assert f"{len(records)} latents in 3 shards, 0 newly encoded" in again.stdout
    assert f"data.latents={out}" in again.stdout


def test_other_thresholds_are_noticed_with_the_mean_tokens(cat_fast, checkpoint, photos, tmp_path):
    command = ["encode-shards", "photographs", "-c", checkpoint, "--size", 64, "--json"]
    usual = cat_fast(*command, "-o", tmp_path / "usual")
    assert "instead of" not in usual.stderr
    other = cat_fast(*command, "-o", tmp_path / "other", "--thresholds", "1,2")
    summary = parse_json(other)
    (line,) = [line for line in other.stderr.splitlines() if line.startswith("ratios: ")]
    assert "thresholds 1,2 instead of" in line
    assert f"mean {summary['mean_tokens']:.1f} tokens per image at 64 px, against 4 at a fixed 16x" in line
    assert [(row["source"], row["thresholds"]) for row in summary["origins"]] == [("score", [1, 2])]
    # Captions of a folder are known only once the images are read.
    for photo in list(photos.iterdir()):
        photo.with_suffix(".txt").write_text("a plane in the sky")
    folder = cat_fast(*command[:1], photos, *command[2:], "-o", tmp_path / "folder", "--thresholds", "1,2")
    assert folder.stderr.count("ratios: thresholds 1,2 instead of") == 1


def test_bad_images_are_reported_and_set_the_exit_code(cat_fast, checkpoint, photos, tmp_path):
    (photos / "broken.jpg").write_bytes((photos / "a.jpg").read_bytes()[:300])
    command = ["encode-shards", photos, "-c", checkpoint, "-o", tmp_path / "out", "--size", 64]
    result = cat_fast(*command)
    assert result.exit_code == 1
    assert "skipped: broken.jpg: the image is damaged" in result.stderr
    assert "3 latents in 1 shards" in result.stdout
    for path in photos.iterdir():
        path.write_bytes(b"")
    command[command.index("-o") + 1] = tmp_path / "none"
    result = cat_fast(*command)
    assert result.exit_code == 2
    assert result.stderr.count("the file is empty") == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        (["PHOTOS", "PHOTOS"], ["one source", "got 2"]),
        (["PHOTOS", "--rank", 2, "--world-size", 2], ["--rank 2", "0 to 1"]),
        (["PHOTOS", "--format", "zip"], ["'zip'", "safetensors or webdataset"]),
        (["PHOTOS", "--device", "abacus", "--workers", 2], ["'abacus' cannot be used"]),
        (["PHOTOS", "--size", 100], ["size 100", "multiple of 64"]),
        (["PHOTOS", "--classes", "no-classes.txt"], ["no-classes.txt", "cannot be read"]),
        (["PHOTOS", "--ratio", 7], ["--ratio 7"]),
    ],
)
def test_bad_input_is_rejected_on_one_line(cat_fast, checkpoint, photos, tmp_path, options, words):
    options = [photos if option == "PHOTOS" else option for option in options]
    result = cat_fast("encode-shards", *options, "-c", checkpoint, "-o", tmp_path / "out")
    assert_one_line_error(result, *words)
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_rejected_without_changing_files(cat_fast, checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    assert cat_fast("encode-shards", photos, "-c", checkpoint, "-o", out, "--size", 64).exit_code == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    tiny_tokenizer(seed=1).save_pretrained(tmp_path / "other")
    result = cat_fast("encode-shards", photos, "-c", tmp_path / "other", "-o", out, "--size", 64)
    assert_one_line_error(
        result, "contains latents made with other settings (fingerprint: ", "another folder"
    )
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("place", [0, 2, 4])
def test_error_for_former_spelling_names_the_new_command(cat_fast, tmp_path, place):
    arguments = ["a b.jsonl", "-c", "DIR", "--workers", "2"]
    old = [*arguments[:place], "--shards", *arguments[place:]]
    assert_one_line_error(cat_fast("encode", *old), "cat-fast encode-shards 'a b.jsonl' -c DIR --workers 2")


@pytest.mark.parametrize(
    ("command", "option"),
    [("encode", "--workers"), ("encode", "--per-shard"), ("encode-shards", "--caption")],
)
def test_option_of_the_other_command_is_rejected(cat_fast, checkpoint, photos, command, option):
    result = cat_fast(command, photos, "-c", checkpoint, option, 2)
    assert result.exit_code == 2
    assert option in result.stderr


def test_killed_run_resumes_with_every_key_once(checkpoint, tmp_path):
    """Kill -9 a run with two worker processes, which must end with it; then resume the run."""
    images, out, count = tmp_path / "images", tmp_path / "out", 400
    images.mkdir()
    for n in range(count):
        noise = np.random.default_rng(n).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 64)).save(images / f"{n:03d}.png")
    command = [sys.executable, "-c", "from cat_fast.cli.main import main; main()", "encode-shards"]
    command += [str(images), "-c", str(checkpoint), "-o", str(out), "--size", "64", "--per-shard", "5"]
    command += ["--ratio", "16", "--workers", "2", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(out.glob("shard-*.json"))) < 10 and time.monotonic() < deadline:
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    kept = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    assert 10 <= len(kept) < count // 5

    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    summary = json.loads(finished.stdout)
    assert summary["encoded_now"] == count - 5 * len(kept)
    assert summary["latents"] == count
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert list(out.glob(".*")) == []
    data = LatentDataset(out)
    assert sorted(entry.key for entry in data.entries) == [f"{n:03d}.png" for n in range(count)]
    tokenizer = NestedAutoencoderKL.from_pretrained(checkpoint)
    for i in range(0, count, 50):
        sample = data[i]
        x = image_to_tensor(resize_center_crop(load_image(images / sample.key), 64))
        with torch.no_grad():
            expected = tokenizer.encode(x[None], 16).latent_dist.mode()[0]
        restored = sample.latent / per_channel(data.scaling_factor) + per_channel(data.shift_factor)
        torch.testing.assert_close(restored, expected, rtol=1e-4, atol=1e-5)


WITHOUT_TORCH = """
import subprocess, sys
from multiprocessing import process

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "diffusers", "transformers", "deepspeed"):
            raise AssertionError(f"imported {name}")

def fail(*args, **options):
    raise AssertionError("started a process")

sys.meta_path.insert(0, Blocked())
process.BaseProcess.start = subprocess.Popen.__init__ = fail
from cat_fast.cli.main import main
from cat_fast.inference.encoding import shard_plan

open_images, opened = shard_plan.open_images, []
shard_plan.open_images = lambda *args: opened.append(args) or open_images(*args)
try:
    main()
finally:
    assert len(opened) == 1, opened
"""


@pytest.mark.parametrize("kind", ["index", "folder"])
def test_rerun_of_a_complete_folder_loads_no_model_and_starts_no_process(
    cat_fast, checkpoint, photos, tmp_path, kind
):
    """A rerun over 100,000 images has to end within seconds."""
    source = photos
    if kind == "index":
        source = tmp_path / "index.jsonl"
        rows = [{"path": str(photo), "ratio": 16} for photo in sorted(photos.iterdir())]
        source.write_text("\n".join(map(json.dumps, rows)))
    tokenizer, out = shutil.copytree(checkpoint, tmp_path / "tokenizer"), tmp_path / "latents"
    command = ["encode-shards", source, "-c", tokenizer, "-o", out, "--size", 64, "--json"]
    first = parse_json(cat_fast(*command))
    command += ["--workers", 2]
    again = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, command)], capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    known = json.loads(again.stdout)
    assert known["encoded_now"] == 0
    assert {key: known[key] for key in ("latents", "ratios", "tokenizer", "mean_tokens", "origins")} == {
        key: first[key] for key in ("latents", "ratios", "tokenizer", "mean_tokens", "origins")
    }


def test_tokenizer_is_compared_by_its_weights_where_its_files_changed(
    cat_fast, checkpoint, photos, tmp_path, monkeypatch
):
    loads = []
    load = NestedAutoencoderKL.from_pretrained

    def recorded(*args, **options):
        loads.append(args)
        return load(*args, **options)

    monkeypatch.setattr(NestedAutoencoderKL, "from_pretrained", recorded)
    first, copied = (shutil.copytree(checkpoint, tmp_path / name) for name in ("first", "copied"))
    command = ["encode-shards", photos, "-o", tmp_path / "out", "--size", 64]
    for tokenizer, loaded in ((first, 1), (first, 0), (copied, 1), (copied, 0)):
        loads.clear()
        assert cat_fast(*command, "-c", tokenizer).exit_code == 0
        assert len(loads) == loaded
    os.utime(copied / "config.json", (0, 0))
    assert cat_fast(*command, "-c", copied).exit_code == 0
    assert len(loads) == 1
    tiny_tokenizer(seed=1).save_pretrained(copied)
    assert_one_line_error(cat_fast(*command, "-c", copied), "made with other settings (fingerprint")
    config = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps(config | {"scaling_factor": 2.0}))
    assert_one_line_error(cat_fast(*command, "-c", first), "made with other settings (fingerprint")
