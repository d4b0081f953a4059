"""A server over thousands of requests, good, bad and broken off: what it answers, and whether it keeps what it took.

The server is a process of its own, started as a user starts it. Its memory, threads and open files are read from the
system as requests go by; at the end nothing may be left waiting, decoding or reserved.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adallava.bench import BenchSettings
from adallava.errors import ConfigError
from adallava.mini.questions import FAMILIES, benchmark
from adallava.mini.scenes import to_image
from adallava.results import ResultRow, provenance

REQUESTS_PER_ROUND = 1000
SAMPLES_PER_ROUND = 2
CLIENTS = 6
_BUDGETS = ("100%", "85%", "60%", "50%", 0.7)
_KINDS = {"whole": 55, "streamed": 20, "broken off": 10, "malformed": 5, "bad image": 5, "infeasible": 5}
"""Requests by kind, and how often they come, in percent."""
_TOKENS, _START_S, _STOP_S = 3, 120.0, 60.0


def measure(settings: BenchSettings) -> list[ResultRow]:
    """Rows of the server as it goes on, the last one after everything is over, with what was answered."""
    import httpx

    if not Path("/proc/self/status").is_file():
        raise ConfigError("the soak reads memory from /proc, which this system has not. Run it on Linux.")
    requests = _requests(settings)
    every = REQUESTS_PER_ROUND // SAMPLES_PER_ROUND
    origin = provenance(device=settings.device, seed=settings.seed)
    config = {"model": settings.model, "clients": CLIENTS}
    outcomes: Counter[str] = Counter()
    rows = []
    with running_server(settings.model, "--threads", str(settings.threads)) as (server, url):
        local = threading.local()

        def ask(number: int) -> str:
            if not hasattr(local, "client"):
                local.client = httpx.Client(timeout=60)
            kind, body = requests[number % len(requests)]
            return f"{kind}: {_ask(local.client, url, kind, body)}"

        began = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            for done in range(0, settings.rounds * REQUESTS_PER_ROUND, every):
                outcomes.update(pool.map(ask, range(done, done + every)))
                told: dict[str, object] = {"seconds": time.perf_counter() - began, **_held(server.pid)}
                rows.append(ResultRow("soak", told, {**config, "after": done + every}, origin))
        with httpx.Client(timeout=60) as client:
            gauges = _gauges(client, url)
    last = {**rows[-1].metrics, **gauges, "outcomes": dict(sorted(outcomes.items())), "exit_status": server.returncode}
    rows[-1] = ResultRow("soak", last, rows[-1].config, origin)
    return rows


@contextmanager
def running_server(model: str, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``adallava serve`` on a port of its own; yields process and address, and stops it as a service manager does."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "adallava.cli.main", "serve", model, "--port", str(port), *options]
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            until = time.perf_counter() + _START_S
            while True:
                try:
                    if httpx.get(f"{url}/healthz", timeout=5).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                if server.poll() is not None or time.perf_counter() > until:
                    said.seek(0)
                    raise ConfigError(f"the server did not start: {said.read().decode(errors='replace')[-2000:]}")
                time.sleep(0.1)
            yield server, url
            server.send_signal(signal.SIGTERM)
            server.wait(_STOP_S)
        finally:
            if server.poll() is None:
                server.kill()
                server.wait()


def _requests(settings: BenchSettings) -> list[tuple[str, dict[str, Any]]]:
    """Bodies of requests of all kinds, in random order."""
    rng = random.Random(settings.seed)
    items = [item for family in FAMILIES for item in benchmark(family, settings.seed, 40)]
    made = []
    for kind, weight in _KINDS.items():
        for _ in range(2 * weight):
            item = rng.choice(items)
            picture = io.BytesIO()
            to_image(item.scene).save(picture, rng.choice(("PNG", "JPEG")))
            data = picture.getvalue()
            if kind == "bad image":
                data = data[: rng.randrange(len(data))]
            url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            parts: list[Any] = [
                {"type": "text", "text": item.question.text},
                {"type": "image_url", "image_url": {"url": url}},
            ]
            body: dict[str, Any] = {
                "model": settings.model,
                "messages": [{"role": "user", "content": parts}],
                "budget": rng.choice(_BUDGETS),
                "max_tokens": _TOKENS,
            }
            if kind in ("streamed", "broken off"):
                body |= {"stream": True, "max_tokens": 4 * _TOKENS}
            if kind == "infeasible":
                body["budget"] = "10%"
            if kind == "malformed":
                body["messages"] = rng.choice([[], "words", [{"role": "nobody", "content": ""}], None])
            made.append((kind, body))
    rng.shuffle(made)
    return made


def _ask(client: Any, url: str, kind: str, body: dict[str, Any]) -> str:
    """What became of a request: its status, or that it was broken off."""
    place = f"{url}/v1/chat/completions"
    if kind not in ("streamed", "broken off"):
        return str(client.post(place, json=body).status_code)
    with client.stream("POST", place, json=body) as answer:
        for number, line in enumerate(answer.iter_lines()):
            if kind == "broken off" and number > 1:
                return f"{answer.status_code}, left"
            if line.startswith("data: ") and "error" in (json.loads(line[6:]) if line != "data: [DONE]" else {}):
                return "error while streaming"
        return str(answer.status_code)


def _held(pid: int) -> dict[str, float]:
    """What a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+)", status, re.MULTILINE)}
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return {"memory_bytes": 1024 * found["VmRSS"], "threads": found["Threads"], "files": files}


def _gauges(client: Any, url: str) -> dict[str, float]:
    """What waits, decodes and is reserved when all clients have gone; given a moment to notice."""
    names = ("adallava_waiting", "adallava_decoding", "adallava_kv_bytes")
    told: dict[str, float] = {}
    for _ in range(50):
        text = client.get(f"{url}/metrics").text
        told = {name: float(re.search(rf"^{name} (\S+)", text, re.MULTILINE)[1]) for name in names}  # type: ignore[index]
        if not any(told.values()):
            break
        time.sleep(0.1)
    return told
