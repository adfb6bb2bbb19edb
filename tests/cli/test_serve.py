"""`cat-fast serve`: refusals before it listens, and its end."""

import errno
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import requests
import uvicorn

from cat_fast.cli import serve as module
from cat_fast.errors import UserError
from cat_fast.inference.server.run import _address, _Server, bind
from cat_fast.inference.server.settings import ServerSettings
from tests.cli.conftest import assert_one_line_error
from tests.inference.engine.mixes import tiny_pipeline
from tests.inference.server.conftest import png


def test_other_addresses_need_a_token(cat_fast, tmp_path):
    assert_one_line_error(
        cat_fast("serve", "-p", tmp_path, "--host", "0.0.0.0"),
        "can be reached from other machines",
        "--insecure",
    )
    empty = tmp_path / "token"
    empty.write_text("\n")
    assert_one_line_error(cat_fast("serve", "-p", tmp_path, "--token-file", empty), "the file is empty")
    assert_one_line_error(
        cat_fast("serve", "-p", tmp_path, "--token-file", tmp_path / "no"), "cannot be read"
    )


def test_a_port_in_use(cat_fast, tmp_path):
    with bind(ServerSettings(name="first", port=0)) as taken:  # another server, still loading its models
        port = taken.getsockname()[1]
        result = cat_fast("serve", "-p", tmp_path, "--port", port)
    assert_one_line_error(result, f"cannot listen on 127.0.0.1:{port}", "the port is in use", "--port")


def test_a_machine_without_ipv6(monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(UserError, match=r"cannot listen on \[::1\]:8000: Address family not supported"):
        bind(ServerSettings(name="a server", host="::1"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--captioner", "eyes"), "--captioner eyes: expected one of"),
        (("--captioner", "vlm"), "--captioner vlm: --captioner-model is missing"),
        (("--captioner-model", "a"), "--captioner-model: applies to --captioner vlm or endpoint"),
        (("--captioner-key-env", "KEY"), "--captioner-key-env: applies to --captioner endpoint"),
    ],
)
def test_options_of_the_captioner_are_checked(cat_fast, options, message):
    assert_one_line_error(cat_fast("serve", "-p", "nano", "--port", 0, *options), message)


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1:8000"), ("::1", "[::1]:8000")])
def test_an_address_is_shown_as_in_a_url(host, shown):
    assert _address(host, 8000) == shown


def test_a_folder_that_is_not_a_pipeline(cat_fast, tmp_path):
    assert_one_line_error(cat_fast("serve", "-p", tmp_path, "--port", 0), "is not a pipeline")
    assert_one_line_error(cat_fast("serve", "-p", tmp_path / "no", "--port", 0), "no such folder")


def test_without_its_packages_it_names_the_extra(cat_fast, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_NEEDED", {"no_such_module": "fastapi"})
    result = cat_fast("serve", "-p", tmp_path)
    assert_one_line_error(result, "the package fastapi is missing", "pip install 'cat-fast[serve]'")


def test_a_second_signal_ends_the_server_while_its_log_is_written(monkeypatch, capfd):
    class Interrupted(io.StringIO):
        def write(self, text):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr(sys, "stderr", Interrupted())
    monkeypatch.setattr(os, "_exit", sys.exit)
    server = _Server(uvicorn.Config("unused", log_config=None))
    server.service = SimpleNamespace(draining=True)
    with pytest.raises(SystemExit) as caught:
        server._signalled(signal.SIGTERM, None)
    assert caught.value.code == 3
    assert "SIGTERM again: ended without finishing" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_drains_and_a_second_one_ends_at_once(tmp_path, signals):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    command = [sys.executable, "-c", "from cat_fast.cli.main import main; main()", "serve"]
    process = subprocess.Popen(
        [*command, "-p", str(tmp_path / "pipeline"), "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    try:
        address = next(line for line in process.stderr if line.startswith("serving ")).split()[-1]
        rest = []
        reader = threading.Thread(target=lambda: rest.extend(process.stderr), daemon=True)
        reader.start()
        while not is_ready(address):
            time.sleep(0.2)
        steps = 1000 if signals == 2 else 4
        body = {"prompt": "0", "num_inference_steps": steps, "scheduler": "ddpm", "n": 8, "ratio": 8}
        replies = []
        sender = threading.Thread(target=lambda: replies.append(post(address, body)), daemon=True)
        sender.start()
        while submitted(address) < body["n"]:
            time.sleep(0.1)
        for _ in range(signals):
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(0.3)
        assert process.wait(60) == (0 if signals == 1 else 3)
        sender.join(10)
        reader.join(10)
        if signals == 1:
            assert replies == [200]
            assert json.loads(rest[-1])["finished"] == 8
        else:
            assert "SIGTERM again" in "".join(rest)
    finally:
        process.kill()


@pytest.mark.slow
def test_a_signal_during_the_start_ends_with_0(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    program = """
import torch
from cat_fast.cli.main import main
from cat_fast.inference.server import service

def endless(*_):
    while True:
        torch.ones(512, 512) @ torch.ones(512, 512)

service.self_test = endless
main()
"""
    command = [sys.executable, "-c", program, "serve", "-p", str(tmp_path / "pipeline"), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        next(line for line in process.stderr if line.startswith("serving "))
        time.sleep(0.3)
        process.terminate()
        rest = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 0, rest
    assert json.loads(rest)["event"] == "stopped"


@pytest.mark.slow
def test_a_captioner_at_work_does_not_hold_up_the_end(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    program = """
import time
from cat_fast.cli.main import main
from cat_fast.complexity.image_scorers import loading

class Slow:
    name, version, writes_captions, concurrent = "slow", "1", True, False

    def describe_many(self, images, captions=None):
        print("describing", flush=True)
        time.sleep(600)

loading.load_captioner = lambda name, options: Slow()
main()
"""
    command = [sys.executable, "-c", program, "serve", "-p", str(tmp_path / "pipeline"), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--drain-seconds", "0.5"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        address = next(line for line in process.stderr if line.startswith("serving ")).split()[-1]
        while not is_ready(address):
            time.sleep(0.2)
        url, files = f"{address}/v1/images/reconstructions", {"image": ("x.png", png())}
        with ThreadPoolExecutor(1) as sender:
            sender.submit(requests.post, url, files=files, timeout=120)
            assert process.stdout.readline() == "describing\n"
            process.terminate()
            rest = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 0, rest
    assert json.loads(rest.splitlines()[-1])["uploads_lost"] == 1


def is_ready(address):
    try:
        return urllib.request.urlopen(f"{address}/readyz", timeout=5).status == 200
    except OSError:
        return False


def submitted(address):
    """Return the number of images that were queued."""
    metrics = urllib.request.urlopen(f"{address}/metrics", timeout=5).read().decode()
    return float(re.search(r'cat_fast_images_total{outcome="submitted"} (\S+)', metrics)[1])


def post(address, body):
    """Return the status of a request for images, 0 if the connection was lost."""
    request = urllib.request.Request(
        f"{address}/v1/images/generations",
        json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    try:
        return urllib.request.urlopen(request, timeout=60).status
    except OSError:
        return 0


@pytest.mark.parametrize("failing", ["server.service.self_test", "engine.cost.CostModel.calibrate"])
def test_a_pipeline_that_fails_its_self_test_or_calibration(cat_fast, tmp_path, monkeypatch, failing):
    def fail(*_):
        raise RuntimeError("a product\noverflows")

    monkeypatch.setattr(f"cat_fast.inference.{failing}", fail)
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    options = ("--port", 0, "--device", "cpu", "--linear-backend", "mkl", "--max-tokens", 128)
    result = cat_fast("serve", "-p", tmp_path / "pipeline", *options)
    assert result.exit_code == 2, result.output
    lines = result.stderr.partition("serving pipeline on ")[2].splitlines()
    assert lines[1:] == ["error: pipeline cannot be served: a product overflows"]
