"""What one caller, or a death, does to all others: attacks on `quire serve`, and what a guest sees meanwhile.

    python -m scripts.siege [idle] [streams] [bodies] [readers] [kills] [--model DIR]

idle     1,100 connections that send nothing, where 1,024 descriptors are allowed; then the core is killed
streams  1,100 streams with one key
bodies   40 bodies with one key, 8 MB each, whose last byte does not come
readers  whole answers of some megabytes with one key, of which nothing is read
kills    64 streams, and three cores in a row are killed as soon as they are there

One line of JSON for each: what the guest, which has a key of its own, was answered and how fast, how many streams
were lost, how large the HTTP side became and how much it logged. Linux only.
"""

import argparse
import asyncio
import json
import os
import resource
import signal
import socket
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

from scripts.served import Server, open_client, stream

FLOOD, GUEST = "flood-key", "guest-key"
KEYS = ["--api-key", FLOOD, "--api-key", GUEST]
ASK = {"prompt": "What is PagedAttention?"}
STREAM = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "temperature": 1.0, "stream": True}
LOUD = {**STREAM, "stream": False, "n": 32, "max_tokens": 300, "logprobs": 20}
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY_BYTES = 8 * 2**20


class Siege:
    """A server under attack."""

    def __init__(self, arguments: list[str], descriptors: int | None = None) -> None:
        self.server = Server(arguments, Path("build/siege.log"), descriptors)
        self.port = int(self.server.url.split(":")[2].split("/")[0])
        self.held: list[socket.socket] = []
        self.latencies_s: list[float] = []
        self.statuses: Counter[str] = Counter()
        self.peak_rss = 0

    def hold(self, data: bytes = b"") -> None:
        """Open a connection, send, and read nothing."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.1", self.port))
        self.held.append(connection)
        sent = 0
        while sent < len(data):
            time.sleep(0.001)
            with suppress(BlockingIOError):
                sent += connection.send(data[sent:])

    def request(self, body: bytes, declared: int | None = None) -> bytes:
        """Of the flood."""
        size = len(body) if declared is None else declared
        return f"{HEAD}Authorization: Bearer {FLOOD}\r\nContent-Length: {size}\r\n\r\n".encode() + body

    async def ask(self, client: httpx.AsyncClient, count: int, path: str = "/v1/completions") -> None:
        """The guest asks so often, once after another."""
        headers = {"Authorization": f"Bearer {GUEST}"}
        for _ in range(count):
            begun_s = time.perf_counter()
            try:
                answer = await client.post(
                    self.server.url.removesuffix("/v1") + path, json=ASK, headers=headers, timeout=60
                )
                self.statuses[str(answer.status_code)] += 1
            except httpx.HTTPError as error:
                self.statuses[type(error).__name__] += 1
            self.latencies_s.append(time.perf_counter() - begun_s)
            self.peak_rss = max(self.peak_rss, psutil.Process(self.server.process.pid).memory_info().rss)

    async def until_ready(self, client: httpx.AsyncClient, most_s: float) -> float | None:
        """Seconds until /readyz says so; None if it does not."""
        begun_s = time.perf_counter()
        while time.perf_counter() - begun_s < most_s:
            with suppress(httpx.HTTPError):
                if (await client.get(self.server.url.removesuffix("/v1") + "/readyz", timeout=5)).status_code == 200:
                    return round(time.perf_counter() - begun_s, 2)
            await asyncio.sleep(0.05)
        return None

    def report(self, name: str, **more: Any) -> None:
        """One line."""
        times = {"p50": statistics.median(self.latencies_s), "most": max(self.latencies_s)} if self.latencies_s else {}
        found = {
            "attack": name, "guest": dict(self.statuses), "guest_s": {key: round(it, 3) for key, it in times.items()},
            "rss_mb": self.peak_rss // 2**20, "log_lines": self.server.said().count("\n"), **more,
        }  # fmt: skip
        print(json.dumps(found), flush=True)

    def end(self) -> None:
        """Let the connections go, and the server."""
        for connection in self.held:
            connection.close()
        self.server.process.kill()
        self.server.process.wait()


async def idle(siege: Siege, client: httpx.AsyncClient) -> dict[str, Any]:
    """Silent connections, a death while the table of descriptors is full, and silence again."""
    await siege.ask(client, 1)
    for _ in range(1100):
        siege.hold()
    await asyncio.sleep(1.0)
    os.kill(siege.server.core_pid() or 0, signal.SIGKILL)
    await asyncio.sleep(0.5)
    ready_s = await siege.until_ready(client, 60.0)
    for _ in range(1100):
        siege.hold()
    await siege.ask(client, 5)
    return {"ready_after_death_s": ready_s}


async def streams(siege: Siege, client: httpx.AsyncClient) -> dict[str, Any]:
    """More than may run and wait. The guest asks for what needs a place in the server, and no row of the engine: for
    those it waits as it would in any queue."""
    for _ in range(1100):
        siege.hold(siege.request(json.dumps(STREAM).encode()))
    await siege.ask(client, 10, "/tokenize")
    return {}


async def bodies(siege: Siege, client: httpx.AsyncClient) -> dict[str, Any]:
    """All but the last byte."""
    part = b'{"prompt": "' + b"x" * (BODY_BYTES - 13)
    for _ in range(40):
        with suppress(OSError):  # refused and closed
            await asyncio.to_thread(siege.hold, siege.request(part, BODY_BYTES))
    await siege.ask(client, 10)
    return {}


async def readers(siege: Siege, client: httpx.AsyncClient) -> dict[str, Any]:
    """Whole answers that their readers do not take: how many of these are still there, and after how long."""
    for _ in range(2):
        siege.hold(siege.request(json.dumps(LOUD).encode()))
    await siege.ask(client, 3)
    process, begun_s, count = psutil.Process(siege.server.process.pid), time.perf_counter(), 2
    while count and time.perf_counter() - begun_s < 240.0:
        await asyncio.sleep(1.0)
        peers = {item.raddr.port for item in process.net_connections("tcp") if item.raddr}
        count = sum(connection.getsockname()[1] in peers for connection in siege.held)
    await siege.ask(client, 3)
    return {"held": count, "after_s": round(time.perf_counter() - begun_s)}


async def kills(siege: Siege, client: httpx.AsyncClient) -> dict[str, Any]:
    """Three cores in a row."""
    client.headers["Authorization"] = f"Bearer {GUEST}"
    bodies = [{**STREAM, "seed": seed} for seed in range(64)]
    whole = await asyncio.gather(*(stream(client, siege.server.url, body, [0]) for body in bodies))
    seen = [[0] for _ in bodies]
    tasks = [asyncio.ensure_future(stream(client, siege.server.url, *item)) for item in zip(bodies, seen, strict=True)]
    while not all(count for (count,) in seen):
        await asyncio.sleep(0.01)
    last: int | None = None
    for _ in range(3):
        while (pid := siege.server.core_pid()) in (None, last):
            await asyncio.sleep(0.002)
        os.kill(pid or 0, signal.SIGKILL)
        last = pid
    await siege.ask(client, 1)
    found = await asyncio.gather(*tasks)
    equal = sum(item.parts == one.parts and item.end == "done" for item, one in zip(found, whole, strict=True))
    return {
        "streams": 64, "lost": 64 - equal, "longest_gap_s": round(max(item.gap_s for item in found), 2),
        "ready_s": await siege.until_ready(client, 40.0),
    }  # fmt: skip


ATTACKS: dict[str, Callable[[Siege, httpx.AsyncClient], Awaitable[dict[str, Any]]]] = {
    "idle": idle, "streams": streams, "bodies": bodies, "readers": readers, "kills": kills,
}  # fmt: skip


async def run(name: str, model: list[str]) -> None:
    """One attack on a server of its own."""
    siege = Siege([*model, *KEYS], 1024 if name == "idle" else None)
    try:
        async with open_client() as client:
            siege.report(name, **await ATTACKS[name](siege, client))
    finally:
        siege.end()


def main() -> None:
    """Run those that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help="all, in this order")
    parser.add_argument("--model", help="a directory; the embedded model")
    options = parser.parse_args()
    if unknown := set(options.attacks) - set(ATTACKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for name in options.attacks or ATTACKS:
        asyncio.run(run(name, [options.model] if options.model else []))


if __name__ == "__main__":
    main()
