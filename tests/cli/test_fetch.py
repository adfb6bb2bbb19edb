"""`cat-fast fetch` with a local server: complete, verified files or none, and messages for the others."""

import hashlib
import shutil
import socket
import threading
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cat_fast.errors import UserError
from cat_fast.generator.text_encoder import TextEncoder
from cat_fast.train import train
from cat_fast.training import pretrained_weights
from cat_fast.training.pretrained_weights import Source
from tests.cli.conftest import assert_one_line_error
from tests.inference.tiny_encoder import save_encoder

CONTENT = bytes(range(256)) * 20_000


@pytest.fixture
def server():
    """URL and requested paths of a server: /good/ has CONTENT, /half/ half of it, /other/ another file."""
    requested = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            folder = self.path.split("/")[1]
            if folder not in ("good", "half", "other"):
                self.send_error(404)
                return
            content = CONTENT if folder != "other" else b"<html>log in first</html>"
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if folder != "half" else content[: len(content) // 2])

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requested
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A configuration like the paper's with a trunk, MoCo's ResNet and a StyleGAN pickle, all missing."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name, source in pretrained_weights.PUBLISHED.items():
        digest = hashlib.new(source.algorithm, CONTENT).hexdigest()[:8]
        changed = Source(url=source.url, algorithm=source.algorithm, digest=digest)
        monkeypatch.setitem(pretrained_weights.PUBLISHED, name, changed)
    path = tmp_path / "run.yaml"
    path.write_text(
        f"task: tokenizer\noutput_dir: {tmp_path / 'run'}\n"
        "loss:\n  perceptual: lpips_vgg\n  features_weight: 0.2\n"
        f"  features_weights: {tmp_path / 'w' / 'moco_v2_800ep_pretrain.pth.tar'}\n"
        f"discriminator:\n  pretrained: {tmp_path / 'w' / 'stylegan.pkl'}\n"
    )
    return path


def test_weights_with_a_url_are_fetched_and_others_are_listed(cat_fast, tmp_path, config, server):
    url, requested = server
    trunk = tmp_path / "torch/hub/checkpoints/vgg16-397923af.pth"
    moco, pickle = (tmp_path / "w" / name for name in ("moco_v2_800ep_pretrain.pth.tar", "stylegan.pkl"))
    result = cat_fast("fetch", config, "--mirror", f"{url}/good/")
    assert result.exit_code == 1, result.output
    assert trunk.read_bytes() == moco.read_bytes() == CONTENT
    assert f"manual    discriminator.pretrained: {pickle} is missing" in result.stdout
    assert requested == [f"/good/{trunk.name}", f"/good/{moco.name}"]
    pickle.touch()
    result = cat_fast("fetch", config)  # needs no network: all files exist
    assert result.exit_code == 0
    assert result.stdout.count("found ") == 3


@pytest.mark.parametrize(
    ("folder", "words"),
    [("half", "expected 5120000 bytes, got 2560000"), ("other", "was discarded"), ("none", "404")],
)
def test_failed_download_leaves_no_file(cat_fast, tmp_path, config, server, folder, words):
    url, _ = server
    assert_one_line_error(cat_fast("fetch", config, "--mirror", f"{url}/{folder}"), words)
    assert not [path for path in (tmp_path / "torch").rglob("*") if path.is_file()]


def test_unreachable_server_is_reported_on_one_line(cat_fast, config):
    assert_one_line_error(cat_fast("fetch", config, "--mirror", "http://127.0.0.1:9"), "cannot be downloaded")


def test_overrides_are_applied_and_packaged_weights_are_not_fetched(cat_fast, config):
    overrides = ["loss.perceptual=st_lpips_alex", "loss.features_weight=0", 'discriminator.pretrained=""']
    result = cat_fast("fetch", config, *overrides)
    assert result.exit_code == 0, result.output
    assert "needs no pretrained weights" in result.stdout


def test_training_without_weights_names_the_fetch_command_before_joining_a_process_group(config):
    with pytest.raises(UserError, match=r"loss\.perceptual: .*loss\.features_weights: ") as caught:
        train(str(config), ["seed=1"])
    assert f"`cat-fast fetch {config} seed=1`" in str(caught.value)
    assert not torch.distributed.is_initialized()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fake hub with the text encoder org/bert, and an empty local cache; downloads copy files."""
    published, cache = tmp_path / "published", tmp_path / "cache"
    save_encoder(published)
    (published / "onnx").mkdir()
    for name in ("tf_model.h5", "README.md", "onnx/config.json"):
        (published / name).touch()
    snapshot = cache / "models--org--bert/snapshots" / ("0" * 40)

    def download(name, *, allow_patterns, ignore_patterns):
        if name != "org/bert":
            raise OSError("404 Client Error:\nRepository Not Found")
        for path in filter(Path.is_file, published.rglob("*")):
            file = path.relative_to(published).as_posix()
            if any(fnmatch(file, p) for p in allow_patterns) and not any(
                fnmatch(file, p) for p in ignore_patterns
            ):
                snapshot.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / file)
        (cache / "models--org--bert/refs").mkdir(exist_ok=True)
        (cache / "models--org--bert/refs/main").write_text(snapshot.name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for target, name in ((socket, "getaddrinfo"), (socket.socket, "connect")):
        monkeypatch.setattr(target, name, lambda *_, **__: pytest.fail("used the network"))
    return published, snapshot


@pytest.fixture
def captioned(tmp_path):
    """A generator's configuration with a text encoder."""
    path = tmp_path / "generator.yaml"
    path.write_text(f"task: generator\noutput_dir: {tmp_path / 'run'}\ntext_encoder: org/bert\n")
    return path


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_text_encoder_is_fetched_once_and_then_needs_no_network(cat_fast, hub, captioned, weights):
    published, snapshot = hub
    state = load_file(published / "model.safetensors")
    if weights == "pytorch_model.bin":
        (published / "model.safetensors").unlink()
    torch.save(state, published / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"'org/bert' is missing or incomplete on this machine.*cat-fast fetch"
    ):
        TextEncoder("org/bert", download=False)
    result = cat_fast("fetch", captioned)
    assert result.exit_code == 0, result.output
    assert f"fetched   text_encoder: {snapshot}" in result.stdout
    assert {path.name for path in snapshot.iterdir()} == {
        "config.json", "tokenizer.json", "tokenizer_config.json", weights,
    }  # fmt: skip
    assert f"found     text_encoder: {snapshot}" in cat_fast("fetch", captioned).stdout
    encoder = TextEncoder("org/bert", download=False)
    assert encoder.name == "org/bert"
    assert encoder.fingerprint() == TextEncoder(published).fingerprint()


def test_incomplete_download_is_fetched_again(cat_fast, hub, captioned):
    _, snapshot = hub
    assert cat_fast("fetch", captioned).exit_code == 0
    index = snapshot / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}')
    for missing in (snapshot / "model-2.safetensors", snapshot / "model.safetensors"):
        missing.unlink(missing_ok=True)
        with pytest.raises(UserError, match=r"text_encoder: org/bert.*`cat-fast fetch"):
            train(str(captioned), [])
    index.unlink()
    assert "fetched" in cat_fast("fetch", captioned).stdout


def test_text_encoder_can_be_a_folder_and_invalid_ones_are_reported(cat_fast, hub, captioned, tmp_path):
    published, _ = hub
    result = cat_fast("fetch", captioned, f"text_encoder={published}")
    assert (result.exit_code, "found " in result.stdout) == (0, True)
    result = cat_fast("fetch", captioned, f"text_encoder={tmp_path / 'nowhere'}")
    assert result.exit_code == 1
    assert f"manual    text_encoder: {tmp_path / 'nowhere'} is missing" in result.stdout
    result = cat_fast("fetch", captioned, "text_encoder=org/brt")
    assert_one_line_error(result, "'org/brt' cannot be downloaded (404 Client Error: Repository Not Found)")
    (published / "config.json").unlink()
    assert_one_line_error(
        cat_fast("fetch", captioned), "'org/bert': config.json, tokenizer or weights are missing"
    )
