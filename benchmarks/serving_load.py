"""Load test of `cat-fast serve` on loopback: mixed requests, cancellations, malformed bodies, SIGTERM.

    python -m benchmarks.serving_load --pipeline nano --json FILE
    python -m benchmarks.serving_load --pipeline DIR --requests 40 --seconds 4        seconds
    python -m benchmarks.serving_load --pipeline DIR --soak 10                        memory over ten minutes

The server is a process of its own. A tenth of the requests is cancelled, a tenth is malformed, a quarter of
the others are streams. SIGTERM arrives after half of them, with long requests in flight. The soak mixes in
uploads. Exits with 1 if a promise is broken.
"""

import argparse
import asyncio
import contextlib
import io
import itertools
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
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.shared import machine
from cat_fast import console
from cat_fast.data.files import atomic_write, require_writable
from cat_fast.errors import UserError
from cat_fast.inference.server.settings import GENERATIONS, RECONSTRUCTIONS
from cat_fast.processes.signals import run_command

MALFORMED: tuple[dict[str, Any], ...] = (
    {"prompt": 7},
    {"prompt": ""},
    {"prompt": "a house", "n": 0},
    {"prompt": "a house", "size": "17x17"},
    {"prompt": "a house", "seed": -1},
    {"prompt": "a house", "unknown": True},
)
STEPS = (4, 6, 8, 10)
LONG_STEPS = 100
"""Steps of the requests that are in flight at SIGTERM."""
BURST = 12
"""Number of these requests."""
READY_SECONDS = 20.0
RESIDENT_BYTES = 2 << 30
HEALTH_P99 = 0.1
SOAK_GROWTH_BYTES = 20_000_000
SOAK_WORKERS = 4
SOAK_KINDS = ("valid", "upload", "valid", "cancelled", "valid", "malformed", "valid", "valid", "valid")
WARM_UP = 16
"""Requests at once before a soak, more than the server has threads for them."""
DRAIN_SECONDS = 60
CANCELLED = "cancelled by the client"


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

    def held(self) -> dict[str, int]:
        """Return its resident memory in bytes, and its numbers of threads and of open files."""
        process = psutil.Process(self.process.pid)
        return {
            "resident_bytes": process.memory_info().rss,
            "threads": process.num_threads(),
            "files": process.num_fds(),
        }

    async def exit(self) -> tuple[int, float]:
        """Send SIGTERM; return the exit code, and the seconds until it exits."""
        terminated = time.perf_counter()
        self.process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(self.process.wait, DRAIN_SECONDS + 30)
        return code, time.perf_counter() - terminated

    def stopped(self) -> dict[str, Any]:
        """Return the totals of its last line."""
        lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        return next(line for line in reversed(lines) if line.get("event") == "stopped")


class Requests:
    """Random requests that the served pipeline accepts, or does not."""

    def __init__(self, client: httpx2.AsyncClient, seed: int) -> None:
        self.client, self.rng = client, random.Random(seed)
        self._prompts = ["a red house by the sea", "a blue sky", "a newspaper page with columns of text"]
        self.settings: dict[str, Any] = {}
        """Pipeline and settings of the server, for the results."""

    async def find_settings(self) -> None:
        """Ask the server for its settings."""
        model = (await self.client.get("/v1/models")).json()["data"][0]
        state = (await self.client.get("/readyz")).json()
        if not model["details"]["takes_text"] and model["details"]["labels"]:
            self._prompts = model["details"]["labels"]
        self.settings = {
            "pipeline": model["id"],
            "max_tokens": model["details"]["max_tokens"],
            "linear_backend": state["linear_backend"],
            "steps": list(STEPS),
            "drain_seconds": DRAIN_SECONDS,
        }

    def body(self, steps: int | None = None) -> dict[str, Any]:
        """Return a random valid request for one image."""
        rng = self.rng
        return {
            "prompt": rng.choice(self._prompts),
            "seed": rng.randrange(2**40),
            "num_inference_steps": steps or rng.choice(STEPS),
            "guidance_scale": rng.choice([1, 1.5, 4]),
            "ratio": rng.choice(["auto", "auto", 16, 32]),
            "stream": rng.random() < 0.25,
        }

    async def send(self, kind: str, steps: int | None = None) -> str:
        """Send one request; return its outcome."""
        content = self.rng.choice(MALFORMED) if kind == "malformed" else self.body(steps)
        work = self._upload() if kind == "upload" else self._generate(content)
        try:
            if kind == "cancelled":
                with contextlib.suppress(TimeoutError):
                    return await asyncio.wait_for(work, 0.2)  # it may be faster
                return CANCELLED
            return await work
        except httpx2.HTTPError:
            return "not connected"

    async def _generate(self, content: dict[str, Any]) -> str:
        if not content.get("stream"):
            reply = await self.client.post(GENERATIONS, json=content)
            return _outcome(reply.status_code, reply.json())
        async with self.client.stream("POST", GENERATIONS, json=content) as reply:
            if reply.status_code != 200:
                await reply.aread()
                return _outcome(reply.status_code, reply.json())
            events = [json.loads(line[6:]) async for line in reply.aiter_lines() if line.startswith("data: ")]
        if events and "error" in events[-1]:
            return _outcome(503, events[-1])
        return _outcome(200, {"data": [one for one in events if one["type"].endswith(".completed")]})

    async def _upload(self) -> str:
        side = self.rng.choice([64, 200, 512])
        pixels = np.frombuffer(self.rng.randbytes(3 * side * side), np.uint8).reshape(side, side, 3)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        data = {"description": "a red house by the sea"} if self.rng.random() < 0.5 else {}
        files = {"image": ("x.png", file.getvalue())}
        reply = await self.client.post(RECONSTRUCTIONS, files=files, data=data)
        return "reconstructions" if reply.status_code == 200 else _outcome(reply.status_code, reply.json())


def _outcome(status: int, reply: dict[str, Any]) -> str:
    """Return what became of a request: an image, an error's code, or that the accepted request was lost."""
    if status == 200:
        return "image" if reply["data"] and reply["data"][0]["b64_json"] else "no image"
    error = reply["error"]
    if error.get("lost"):
        return f"{status} lost"
    return f"{status} {error['code']}" if error["message"] else "no reason"


async def counters(client: httpx2.AsyncClient) -> dict[str, Any]:
    """Return the server's counts of images and refused requests, and its errors of predictions."""
    found: dict[str, Any] = {"refused": {}, "prediction_errors": {}}
    for family in text_string_to_metric_families((await client.get("/metrics")).text):
        for sample in family.samples:
            if sample.name == "cat_fast_images_total":
                found[sample.labels["outcome"]] = int(sample.value)
            elif sample.name == "cat_fast_refused_total":
                found["refused"][sample.labels["code"]] = int(sample.value)
            elif sample.name == "cat_fast_unfinished":
                found["unfinished"] = int(sample.value)
            elif sample.name == "cat_fast_prediction_error":
                found["prediction_errors"][sample.labels["load"]] = sample.value
    return found


async def accounted(client: httpx2.AsyncClient, sent: int) -> dict[str, Any]:
    """Return the counters once they include `sent` requests, or after ten seconds."""
    for _ in range(100):
        found = await counters(client)
        if answered(found) >= sent:
            break
        await asyncio.sleep(0.1)
    return found | {"sent": sent}


def answered(found: dict[str, Any]) -> int:
    """Return the number of requests for one image that were accepted or refused."""
    return found["submitted"] + sum(found["refused"].values())


async def watch_health(client: httpx2.AsyncClient, latencies: list[float]) -> None:
    """Measure the latency of /healthz until cancelled or the server is gone."""
    with contextlib.suppress(httpx2.HTTPError):
        while True:
            begun = time.perf_counter()
            await client.get("/healthz")
            latencies.append(time.perf_counter() - begun)
            await asyncio.sleep(0.05)


async def load(server: Server, requests: int, seconds: float, long_steps: int = LONG_STEPS) -> dict[str, Any]:
    """Send requests evenly over some seconds, SIGTERM after half of them; return what happened."""
    async with httpx2.AsyncClient(base_url=server.address, timeout=DRAIN_SECONDS + 60) as client:
        ready = await server.ready(client)
        resident = server.held()["resident_bytes"]
        random_requests = Requests(client, 0)
        await random_requests.find_settings()
        latencies: list[float] = []
        health = asyncio.create_task(watch_health(client, latencies))
        sent: list[tuple[str, asyncio.Task[str]]] = []

        async def send_half(when: str, numbers: range) -> None:
            for number in numbers:
                kind = "malformed" if number % 10 == 3 else "cancelled" if number % 10 == 7 else "valid"
                sent.append((f"{kind} {when} SIGTERM", asyncio.create_task(random_requests.send(kind))))
                await asyncio.sleep(seconds / requests)

        await send_half("before", range(requests // 2))
        for _ in range(BURST):
            task = asyncio.create_task(random_requests.send("valid", long_steps))
            sent.append(("valid before SIGTERM", task))
        before = await accounted(client, len(sent))
        ended = asyncio.create_task(server.exit())
        await send_half("after", range(requests // 2, requests))
        outcomes: dict[str, Counter[str]] = {}
        for name, task in sent:
            outcomes.setdefault(name, Counter())[await task] += 1
        code, drained = await ended
        health.cancel()
    return {
        "settings": random_requests.settings
        | {"requests": len(sent), "seconds": seconds, "steps_at_sigterm": long_steps},
        "ready_seconds": ready,
        "resident_bytes": resident,
        "health_p99_seconds": float(np.percentile(latencies, 99)),
        "health_calls": len(latencies),
        "exit_code": code,
        "drain_seconds": drained,
        "before_sigterm": before,
        "outcomes": {name: dict(counts) for name, counts in outcomes.items()},
        "totals": server.stopped(),
    }


def broken_promises(found: dict[str, Any]) -> list[str]:
    """Return the promises that a load test broke, in words."""
    outcomes, totals, before = found["outcomes"], found["totals"], found["before_sigterm"]
    accepted = outcomes["valid before SIGTERM"]
    checks = {
        "every accepted request ends in its image, or is lost at the drain limit": set(accepted)
        <= {"image", "503 lost", "429 queue_full"},
        "images are lost at the drain limit only": totals["lost"] == 0
        or found["drain_seconds"] >= DRAIN_SECONDS,
        "requests are in flight at SIGTERM": before["unfinished"] > 0,
        "after SIGTERM, requests are refused": set(outcomes["valid after SIGTERM"])
        <= {"503 draining", "not connected"},
        "malformed requests get a 4xx with a reason": _all_4xx(outcomes["malformed before SIGTERM"]),
        "every request is submitted or refused": before["sent"] == answered(before),
        "the drain keeps to its limit": found["drain_seconds"] <= DRAIN_SECONDS + 10,
        "/healthz answers in 100 ms at p99": found["health_p99_seconds"] < HEALTH_P99,
        "ready in 20 s": found["ready_seconds"] <= READY_SECONDS,
        "at most 2 GB resident": found["resident_bytes"] <= RESIDENT_BYTES,
    }
    return _broken(checks | _checks_of_end(found))


async def soak(server: Server, minutes: float) -> dict[str, Any]:
    """Send a mixed load for some minutes; return what the server holds when idle, after each fifth."""
    no_idle_connections = httpx2.Limits(max_keepalive_connections=0)  # they are open files
    async with httpx2.AsyncClient(base_url=server.address, timeout=120, limits=no_idle_connections) as client:
        await server.ready(client)
        random_requests = Requests(client, 1)
        await random_requests.find_settings()
        outcomes = {kind: Counter[str]() for kind in SOAK_KINDS}
        kinds = itertools.cycle(SOAK_KINDS)
        running, busy = asyncio.Event(), 0
        begun = time.perf_counter()

        async def send(kind: str) -> None:
            outcomes[kind][await random_requests.send(kind)] += 1

        async def worker() -> None:
            nonlocal busy
            while time.perf_counter() - begun < 60 * minutes:
                await running.wait()
                busy += 1
                try:
                    await send(next(kinds))
                finally:  # else `sample` would wait forever
                    busy -= 1

        async def sample(minute: float) -> dict[str, Any]:
            running.clear()
            while busy or (await counters(client))["unfinished"]:
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.5)  # connections close
            held = server.held()
            running.set()
            return {"minute": minute} | held

        await asyncio.gather(*(send("valid") for _ in range(WARM_UP)))
        running.set()
        workers = [asyncio.create_task(worker()) for _ in range(SOAK_WORKERS)]
        samples = []
        for fifth in range(1, 6):
            await asyncio.sleep(max(0.0, begun + fifth * 12 * minutes - time.perf_counter()))
            samples.append(await sample(fifth * minutes / 5))
        await asyncio.gather(*workers)
        code, drained = await server.exit()
    return {
        "settings": random_requests.settings | {"minutes": minutes, "requests_at_once": SOAK_WORKERS},
        "samples": samples,
        "growth_bytes": samples[-1]["resident_bytes"] - samples[0]["resident_bytes"],
        "exit_code": code,
        "drain_seconds": drained,
        "outcomes": {kind: dict(counts) for kind, counts in outcomes.items()},
        "totals": server.stopped(),
    }


def broken_soak_promises(found: dict[str, Any]) -> list[str]:
    """Return the promises that a soak broke, in words."""
    outcomes, first, last = found["outcomes"], found["samples"][0], found["samples"][-1]
    sent = sum(sum(counts.values()) for kind, counts in outcomes.items() if kind != "upload")
    checks = {
        "memory rises by less than 20 MB": found["growth_bytes"] < SOAK_GROWTH_BYTES,
        "no thread is left": last["threads"] <= first["threads"],
        "no file is left open": last["files"] <= first["files"],
        "every valid request ends in its image": set(outcomes["valid"]) == {"image"},
        "every upload ends in its reconstructions": set(outcomes["upload"]) == {"reconstructions"},
        "malformed requests get a 4xx with a reason": _all_4xx(outcomes["malformed"]),
        "every request is submitted or refused": sent == answered(found["totals"]),
    }
    return _broken(checks | _checks_of_end(found))


def _checks_of_end(found: dict[str, Any]) -> dict[str, bool]:
    totals = found["totals"]
    return {
        "counters add up": totals["submitted"] == totals["finished"] + totals["cancelled"] + totals["failed"],
        "nothing fails": totals["failed"] == totals["lost"],
        "a clean drain exits with 0": found["exit_code"] == 0,
    }


def _all_4xx(outcomes: dict[str, int]) -> bool:
    return all(outcome.startswith("4") for outcome in outcomes)


def _broken(checks: dict[str, bool]) -> list[str]:
    return [promise for promise, kept in checks.items() if not kept]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Load test of the server.")
    parser.add_argument("--pipeline", required=True, metavar="DIR|nano")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument(
        "--soak", type=float, metavar="MINUTES", help="watch memory, threads and open files instead"
    )
    given = parser.parse_args(arguments)
    try:
        if given.json is not None:
            require_writable(given.json)
        with tempfile.TemporaryDirectory() as folder:
            server = Server(given.pipeline, Path(folder) / "log")
            try:
                if given.soak:
                    found = asyncio.run(soak(server, given.soak))
                    broken = broken_soak_promises(found)
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
