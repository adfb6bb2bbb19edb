"""`cat-fast fetch` against a server on this machine: whole, checked files or none, and words for the rest."""

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
    """URL of a server that has CONTENT under /good/, and half of it, and another file, elsewhere."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
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
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A configuration like the paper's: a trunk, MoCo's ResNet, a StyleGAN pickle; none of them there."""
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


def test_what_has_a_url_is_fetched_and_checked_and_the_rest_is_explained(cat_fast, tmp_path, config, server):
    url, asked = server
    trunk = tmp_path / "torch/hub/checkpoints/vgg16-397923af.pth"
    moco, pickle = (tmp_path / "w" / name for name in ("moco_v2_800ep_pretrain.pth.tar", "stylegan.pkl"))
    result = cat_fast("fetch", config, "--mirror", f"{url}/good/")
    assert result.exit_code == 1, result.output
    assert trunk.read_bytes() == moco.read_bytes() == CONTENT
    assert f"by hand   discriminator.pretrained: {pickle} is missing" in result.stdout
    assert asked == [f"/good/{trunk.name}", f"/good/{moco.name}"]
    pickle.touch()
    result = cat_fast("fetch", config)  # no network needed: all is there
    assert result.exit_code == 0
    assert result.stdout.count("is there") == 3


@pytest.mark.parametrize(
    ("folder", "words"),
    [("half", "expected 5120000 bytes, got 2560000"), ("other", "was discarded"), ("none", "404")],
)
def test_a_download_that_goes_wrong_leaves_nothing(cat_fast, tmp_path, config, server, folder, words):
    url, _ = server
    assert_one_line_error(cat_fast("fetch", config, "--mirror", f"{url}/{folder}"), words)
    assert not [path for path in (tmp_path / "torch").rglob("*") if path.is_file()]


def test_a_server_that_is_not_there_is_one_line(cat_fast, config):
    assert_one_line_error(cat_fast("fetch", config, "--mirror", "http://127.0.0.1:9"), "cannot be downloaded")


def test_overrides_count_and_what_ships_needs_nothing(cat_fast, config):
    nothing = ["loss.perceptual=st_lpips_alex", "loss.features_weight=0", 'discriminator.pretrained=""']
    result = cat_fast("fetch", config, *nothing)
    assert result.exit_code == 0, result.output
    assert "needs no weights" in result.stdout


def test_a_rank_that_misses_weights_says_how_to_fetch_them_and_joins_no_process_group(config):
    with pytest.raises(UserError, match=r"loss\.perceptual: .*loss\.features_weights: ") as caught:
        train(str(config), ["seed=1"])
    assert f"`cat-fast fetch {config} seed=1`" in str(caught.value)
    assert not torch.distributed.is_initialized()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's side of a text encoder, org/bert, and this machine's empty cache; downloads copy."""
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
        monkeypatch.setattr(target, name, lambda *_, **__: pytest.fail("asked the network"))
    return published, snapshot


@pytest.fixture
def captioned(tmp_path):
    """A generator's configuration with a text encoder."""
    path = tmp_path / "generator.yaml"
    path.write_text(f"task: generator\noutput_dir: {tmp_path / 'run'}\ntext_encoder: org/bert\n")
    return path


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_text_encoder_is_fetched_once_and_then_needs_no_network(cat_fast, hub, captioned, weights):
    published, snapshot = hub
    state = load_file(published / "model.safetensors")
    if weights == "pytorch_model.bin":
        (published / "model.safetensors").unlink()
    torch.save(state, published / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"'org/bert' is not on this machine.*cat-fast fetch"):
        TextEncoder("org/bert", download=False)
    result = cat_fast("fetch", captioned)
    assert result.exit_code == 0, result.output
    assert f"fetched   text_encoder: {snapshot}" in result.stdout
    assert {path.name for path in snapshot.iterdir()} == {
        "config.json", "tokenizer.json", "tokenizer_config.json", weights,
    }  # fmt: skip
    assert f"is there  text_encoder: {snapshot}" in cat_fast("fetch", captioned).stdout
    encoder = TextEncoder("org/bert", download=False)
    assert encoder.name == "org/bert"
    assert encoder.fingerprint() == TextEncoder(published).fingerprint()


def test_a_download_that_was_cut_short_is_none(cat_fast, hub, captioned):
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


def test_a_text_encoder_may_be_a_folder_and_what_is_none_is_said(cat_fast, hub, captioned, tmp_path):
    published, _ = hub
    result = cat_fast("fetch", captioned, f"text_encoder={published}")
    assert (result.exit_code, "is there" in result.stdout) == (0, True)
    result = cat_fast("fetch", captioned, f"text_encoder={tmp_path / 'nowhere'}")
    assert result.exit_code == 1
    assert f"by hand   text_encoder: {tmp_path / 'nowhere'} is missing" in result.stdout
    result = cat_fast("fetch", captioned, "text_encoder=org/brt")
    assert_one_line_error(result, "'org/brt' cannot be downloaded (404 Client Error: Repository Not Found)")
    (published / "config.json").unlink()
    assert_one_line_error(cat_fast("fetch", captioned), "'org/bert' lacks config.json")
