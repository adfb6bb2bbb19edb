"""`cat-fast fetch` against a server on this machine: whole, checked files or none, and words for the rest."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from cat_fast.errors import UserError
from cat_fast.train import train
from cat_fast.training import weights
from cat_fast.training.weights import Source
from tests.cli.conftest import assert_one_line_error

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
    for name, source in weights.PUBLISHED.items():
        digest = hashlib.new(source.algorithm, CONTENT).hexdigest()[:8]
        changed = Source(url=source.url, algorithm=source.algorithm, digest=digest)
        monkeypatch.setitem(weights.PUBLISHED, name, changed)
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
    [("half", "2560000 of 5120000 bytes came"), ("other", "it is another file"), ("none", "404")],
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
