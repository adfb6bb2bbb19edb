"""Local HTTP server that answers as a test decides: an OpenAI-compatible endpoint or a llama.cpp server."""

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Raw:
    """Answer that is not JSON with status 200."""

    status: int = 200
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    """Reset the connection after half of the content."""
    wait: float = 0.0
    """Seconds before the answer, and between its bytes."""


@dataclass
class Stub:
    """A running server and the requests that it got."""

    url: str
    answer: Callable[[str, dict[str, Any]], dict[str, Any] | Raw]
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """Return the bodies of the requests for a path, in order."""
        return [body for got, body, _ in self.requests if got == path]


@contextmanager
def serve(answer: Callable[[str, dict[str, Any]], dict[str, Any] | Raw]) -> Iterator[Stub]:
    """Run a server whose answers are those of `answer(path, body)`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            with lock:
                stub.requests.append((self.path, body, dict(self.headers)))
            result = stub.answer(self.path, body)
            if not isinstance(result, Raw):
                result = Raw(content=json.dumps(result).encode())
            try:
                self._send(result)
            except OSError:  # the client has given up
                self.close_connection = True

        do_GET = do_POST

        def _send(self, raw: Raw) -> None:
            if raw.wait and not raw.content:
                closed.wait(raw.wait)
                self.close_connection = True
                return
            self.send_response(raw.status)
            for name, value in {"Content-Length": str(len(raw.content)), **raw.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if raw.drop:
                self.wfile.write(raw.content[: len(raw.content) // 2])
                self.wfile.flush()
                reset = struct.pack("ii", 1, 0)  # no lingering: the client sees a reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                self.connection.close()
                self.close_connection = True
                return
            for byte in (
                [raw.content[i : i + 1] for i in range(len(raw.content))] if raw.wait else [raw.content]
            ):
                self.wfile.write(byte)
                time.sleep(raw.wait)

        def log_message(self, *arguments: Any) -> None:
            pass

    lock = threading.Lock()
    closed = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub = Stub(f"http://127.0.0.1:{server.server_port}", answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        closed.set()
        server.shutdown()
        server.server_close()
        thread.join()


def caption_of(text: str) -> str:
    """Return the caption that is quoted last in a prompt."""
    return re.findall(r"<caption>(.*?)</caption>", text)[-1]


def chat(text: str | None, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return a response of OpenAI's chat completions."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
    if logprobs is not None:
        choice["logprobs"] = {"content": logprobs}
    return {"object": "chat.completion", "choices": [choice]}


def token(text: str, logprob: float = 0.0, top: dict[str, float] | None = None) -> dict[str, Any]:
    """Return a token as in OpenAI's and llama.cpp's lists of probabilities."""
    rows = [{"token": t, "logprob": p} for t, p in (top or {}).items()]
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": rows}
