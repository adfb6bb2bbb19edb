"""Load test of `cat-fast serve` on loopback: mixed requests, cancellations, malformed bodies, SIGTERM.

    python -m benchmarks.serving_load --pipeline nano --json FILE
    python -m benchmarks.serving_load --pipeline DIR --requests 40 --seconds 4        seconds
    python -m benchmarks.serving_load --pipeline DIR --soak 10                        memory over ten minutes

The server is a process of its own. A tenth of the requests is cancelled, a tenth is malformed, and SIGTERM
arrives after half of them. Exits with 1 if a promise is broken.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil

from benchmarks.shared import machine
from cat_fast import console
from cat_fast.data.files import atomic_write, require_writable
from cat_fast.errors import UserError
from cat_fast.processes.signals import run_command

MALFORMED: tuple[dict[str, Any], ...] = (
    {"prompt": 7},
    {"prompt": ""},
    {"prompt": "a house", "n": 0},
    {"prompt": "a house", "size": "17x17"},
    {"prompt": "a house", "seed": -1},
    {"prompt": "a house", "unknown": True},
)
READY_SECONDS = 20.0
RESIDENT_BYTES = 2 << 30
HEALTH_P99 = 0.1
SOAK_GROWTH = 20 << 20
DRAIN_SECONDS = 60


class Server:
    """`cat-fast serve` on a free port of loopback."""

    def __init__(self, pipeline: str, log: Path) -> None:
        self._log = log
        command = [sys.executable, "-c", "from cat_fast.cli.main import main; main()", "serve"]
        command += ["--pipeline", pipeline, "--port", "0", "--requests-per-minute", "0"]
        command += ["--drain-seconds", str(DRAIN_SECONDS)]
        self.started = time.perf_counter()
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stderr=file, stdout=file)
        self.address = self._address()

    def _address(self) -> str:
        while self.process.poll() is None:
            for line in self._log.read_text().splitlines():
                if line.startswith("serving "):
                    return line.split()[-1]
            time.sleep(0.05)
        raise UserError(f"the server did not start: {self._log.read_text().strip()}")

    async def ready(self, client: httpx2.AsyncClient) -> float:
        """Wait until it is ready; return the seconds since its start."""
        while (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.1)
        return time.perf_counter() - self.started

    def resident(self) -> int:
        """Return its resident memory in bytes."""
        return psutil.Process(self.process.pid).memory_info().rss

    def stopped(self) -> dict[str, Any]:
        """Return the totals of its last line."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        return next(line for line in reversed(lines) if line.get("event") == "stopped")


def body(rng: random.Random, labels: Sequence[str], takes_text: bool) -> dict[str, Any]:
    """Return a random valid request."""
    prompt = rng.choice(labels) if labels and not takes_text else rng.choice(
        ["a red house by the sea", "a blue sky", "a newspaper page with columns of text and photographs"]
    )  # fmt: skip
    return {
        "prompt": prompt,
        "seed": rng.randrange(2**40),
        "num_inference_steps": rng.choice([4, 6, 8, 10]),
        "guidance_scale": rng.choice([1, 1.5, 4]),
        "ratio": rng.choice(["auto", "auto", 16, 32]),
    }


async def send(client: httpx2.AsyncClient, kind: str, content: dict[str, Any]) -> str:
    """Send one request; return its outcome."""
    try:
        call = client.post("/v1/images/generations", json=content)
        if kind == "cancelled":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(call, 0.2)
                return "image"  # it was faster
            return "cancelled by the client"
        reply = await call
    except httpx2.HTTPError:
        return "not connected"
    if reply.status_code == 200:
        return "image" if reply.json()["data"][0]["b64_json"] else "no image"
    error = reply.json()["error"]
    return f"{reply.status_code} {error['code']}" if error["message"] else "no reason"


async def watch_health(client: httpx2.AsyncClient, latencies: list[float]) -> None:
    """Measure the latency of /healthz until cancelled or the server is gone."""
    with contextlib.suppress(httpx2.HTTPError):
        while True:
            begun = time.perf_counter()
            await client.get("/healthz")
            latencies.append(time.perf_counter() - begun)
            await asyncio.sleep(0.05)


async def load(server: Server, requests: int, seconds: float) -> dict[str, Any]:
    """Send requests evenly over some seconds, SIGTERM after half of them; return what happened."""
    rng = random.Random(0)
    async with httpx2.AsyncClient(base_url=server.address, timeout=DRAIN_SECONDS + 60) as client:
        ready = await server.ready(client)
        resident = server.resident()
        details = (await client.get("/v1/models")).json()["data"][0]["details"]
        latencies: list[float] = []
        health = asyncio.create_task(watch_health(client, latencies))
        sent: list[tuple[str, bool, asyncio.Task[str]]] = []
        metrics = ""
        for number in range(requests):
            kind = "malformed" if number % 10 == 3 else "cancelled" if number % 10 == 7 else "valid"
            content = (
                rng.choice(MALFORMED)
                if kind == "malformed"
                else body(rng, details["labels"], details["takes_text"])
            )
            before = number < requests // 2
            if number == requests // 2:
                metrics = (await client.get("/metrics")).text
                server.process.send_signal(signal.SIGTERM)
                terminated = time.perf_counter()
            sent.append((kind, before, asyncio.create_task(send(client, kind, content))))
            await asyncio.sleep(seconds / requests)
        outcomes = [(kind, before, await task) for kind, before, task in sent]
        code = await asyncio.to_thread(server.process.wait, DRAIN_SECONDS + 30)
        drained = time.perf_counter() - terminated
        health.cancel()
    return {
        "ready_seconds": ready,
        "resident_bytes": resident,
        "health_p99_seconds": float(np.percentile(latencies, 99)),
        "health_calls": len(latencies),
        "exit_code": code,
        "drain_seconds": drained,
        "outcomes": {
            name: dict(Counter(outcome for kind, before, outcome in outcomes if (kind, before) == key))
            for name, key in (
                ("valid before SIGTERM", ("valid", True)),
                ("valid after SIGTERM", ("valid", False)),
                ("cancelled before SIGTERM", ("cancelled", True)),
                ("cancelled after SIGTERM", ("cancelled", False)),
                ("malformed before SIGTERM", ("malformed", True)),
                ("malformed after SIGTERM", ("malformed", False)),
            )
        },
        "totals": server.stopped(),
        "prediction_errors": [
            line for line in metrics.splitlines() if line.startswith("cat_fast_prediction_error")
        ],
    }


def broken_promises(found: dict[str, Any]) -> list[str]:
    """Return the promises that a load test broke, in words."""
    outcomes, totals = found["outcomes"], found["totals"]
    ended = {outcome.split()[0] for outcome in outcomes["valid before SIGTERM"]}
    malformed = outcomes["malformed before SIGTERM"]
    checks = {
        "every accepted request ends in its image, or after the drain limit in a 503": ended
        <= {"image", "503", "429"},
        "after SIGTERM, requests are refused": set(outcomes["valid after SIGTERM"])
        <= {"503 draining", "not connected"},
        "malformed requests get a 4xx with a reason": all(outcome.startswith("4") for outcome in malformed),
        "counters add up": totals["submitted"] == totals["finished"] + totals["cancelled"] + totals["failed"],
        "nothing fails": totals["failed"] == totals["lost"],
        "a clean drain exits with 0": found["exit_code"] == 0,
        "the drain keeps to its limit": found["drain_seconds"] <= DRAIN_SECONDS + 10,
        "/healthz answers in 100 ms at p99": found["health_p99_seconds"] < HEALTH_P99,
        "ready in 20 s": found["ready_seconds"] <= READY_SECONDS,
        "at most 2 GB resident": found["resident_bytes"] <= RESIDENT_BYTES,
    }
    return [promise for promise, kept in checks.items() if not kept]


async def soak(server: Server, minutes: float) -> dict[str, Any]:
    """Send a mixed load of four at a time for some minutes; return resident memory and threads per fifth."""
    rng = random.Random(1)
    async with httpx2.AsyncClient(base_url=server.address, timeout=120) as client:
        await server.ready(client)
        details = (await client.get("/v1/models")).json()["data"][0]["details"]
        begun = time.perf_counter()
        samples: list[dict[str, Any]] = []

        async def worker() -> None:
            while time.perf_counter() - begun < 60 * minutes:
                kind = rng.choice(["valid"] * 8 + ["cancelled", "malformed"])
                content = rng.choice(MALFORMED) if kind == "malformed" else body(
                    rng, details["labels"], details["takes_text"]
                )  # fmt: skip
                await send(client, kind, content)

        workers = [asyncio.create_task(worker()) for _ in range(4)]
        process = psutil.Process(server.process.pid)
        for fifth in range(1, 6):
            await asyncio.sleep(max(0.0, begun + fifth * 12 * minutes - time.perf_counter()))
            samples.append(
                {
                    "minute": fifth * minutes / 5,
                    "resident_bytes": server.resident(),
                    "threads": process.num_threads(),
                    "files": process.num_fds(),
                }
            )
        await asyncio.gather(*workers)
    server.process.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(server.process.wait, DRAIN_SECONDS + 30)
    growth = samples[-1]["resident_bytes"] - samples[0]["resident_bytes"]
    return {"samples": samples, "growth_bytes": growth, "exit_code": code, "totals": server.stopped()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Load test of the server.")
    parser.add_argument("--pipeline", required=True, metavar="DIR|nano")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="watch memory instead")
    given = parser.parse_args(arguments)
    try:
        if given.json is not None:
            require_writable(given.json)
        with tempfile.TemporaryDirectory() as folder:
            server = Server(given.pipeline, Path(folder) / "log")
            try:
                if given.soak:
                    found = asyncio.run(soak(server, given.soak))
                    broken = (
                        ["memory rises by less than 20 MB"] if found["growth_bytes"] > SOAK_GROWTH else []
                    )
                else:
                    found = asyncio.run(load(server, given.requests, given.seconds))
                    broken = broken_promises(found)
            finally:
                if server.process.poll() is None:
                    server.process.kill()
                    server.process.wait()
    except UserError as error:
        console.print_error(error)
        return 2
    about = {
        "benchmark": "serving_load",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **machine.describe(),
    }
    results = {"about": about | {"load": os.getloadavg()[0]}, "broken": broken, **found}
    print(json.dumps(found, indent=1))
    for promise in broken:
        print(f"BROKEN: {promise}", file=sys.stderr)
    if given.json is not None:
        with atomic_write(given.json) as path:
            path.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
