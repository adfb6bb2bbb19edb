"""Running a server: socket, start-up, signals and drain."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn

from cat_fast.errors import UserError
from cat_fast.inference.server.app import create_app
from cat_fast.inference.server.limits import log_line
from cat_fast.inference.server.service import Service, prepare_in_background
from cat_fast.inference.server.settings import ServerSettings

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_EXIT_FORCED = 3
_STDERR = 2


class _Server(uvicorn.Server):
    """uvicorn that drains the engine at the first signal while it still answers, and ends at the second."""

    service: Service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._signalled) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.service.draining:
            with contextlib.suppress(OSError):  # `print` raises if the signal interrupts another one
                os.write(_STDERR, f"{name} again: ended without finishing the images in flight\n".encode())
            os._exit(_EXIT_FORCED)
        self.service.draining = True
        threading.Thread(target=self._drain, name="cat-fast drain", daemon=True).start()

    def _drain(self) -> None:
        self.service.drain()
        self.should_exit = True


def bind(settings: ServerSettings) -> socket.socket:
    """Return a socket that listens on the server's address, so that no other server can.

    Raises:
        UserError: the port is in use, the address is not one of this machine, or IPv6 is not supported.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with contextlib.ExitStack() as on_error:
            bound = on_error.enter_context(socket.socket(family, socket.SOCK_STREAM))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((settings.host, settings.port))
            bound.listen()
            on_error.pop_all()
    except OSError as error:
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))
        raise UserError(
            f"cannot listen on {_address(settings.host, settings.port)}: {reason};"
            " choose another --port or --host"
        ) from error
    return bound


def _address(host: str, port: int) -> str:
    """Return HOST:PORT as in a URL, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve(service: Service, bound: socket.socket) -> int:
    """Serve until a signal; return the exit code, 0 after a drain. A signal during the start ends at once.

    Requests get 503 until calibration and self-test have run, which takes seconds, or minutes if the decoder
    is compiled.

    Raises:
        UserError: calibration or self-test failed.
    """
    config = uvicorn.Config(
        create_app(service), log_config=None, access_log=False, timeout_graceful_shutdown=5, lifespan="off"
    )
    server = _Server(config)
    server.service = service

    def failed() -> None:
        service.draining = True  # uploads are answered from the start on
        server.should_exit = True

    preparing = prepare_in_background(service, failed)
    address = _address(*bound.getsockname()[:2])
    print(f"serving {service.settings.name} on http://{address}", file=sys.stderr, flush=True)
    runner = asyncio.Runner()
    runner.run(server.serve(sockets=[bound]))
    describing = service.describer.active
    if not describing:
        runner.close()  # joins the threads of uploads
    if service.failure is not None:
        raise UserError(f"{service.settings.name} cannot be served: {service.failure}")
    totals = service.engine.statistics
    log_line(
        {
            "event": "stopped",
            "submitted": totals.submitted,
            "finished": totals.finished,
            "cancelled": totals.cancelled,
            "failed": totals.failed,
            "refused": dict(service.refusals),
            "lost": len(service.lost),
            "uploads_lost": describing,
        }
    )
    # Neither native code nor a captioner can be interrupted; the interpreter would abort, or wait for them.
    if preparing.is_alive() or describing:
        os._exit(0)
    return 0
