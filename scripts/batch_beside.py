"""A batch with a restart in the middle: lines lost, lines doubled, and the TPOT of live clients beside it.

python -m scripts.batch_beside [--lines 10000] [--clients 4] [--seconds 20] [--model DIR]

First live clients alone for so many seconds, then a batch, and the same clients beside it; then they stop, the server
is killed once half of the lines are done, and started again. Prints what was lost and doubled, and the median and 99th
percentile of TPOT without and with the batch. Exit 1 when a line was lost or doubled.
"""

import argparse
import asyncio
import json
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from scripts.served import Server, open_client

LIVE = {"prompt": "The quick brown fox", "max_tokens": 48, "ignore_eos": True, "temperature": 0, "stream": True}
LINE = {"max_tokens": 8, "ignore_eos": True, "temperature": 0}


async def live(client: httpx.AsyncClient, url: str, until_s: float) -> list[float]:
    """TPOT of one request after another, in milliseconds."""
    found = []
    while time.perf_counter() < until_s:
        times = []
        async with client.stream("POST", f"{url}/completions", json=LIVE) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
        if len(times) > 2:
            found.append(1000 * (times[-1] - times[0]) / (len(times) - 1))
    return found


async def clients(url: str, count: int, seconds: float) -> list[float]:
    """The same of several at one time."""
    async with open_client() as client:
        until_s = time.perf_counter() + seconds
        return [
            item
            for found in await asyncio.gather(*(live(client, url, until_s) for _ in range(count)))
            for item in found
        ]


def submit(http: httpx.Client, count: int) -> str:
    """The id of a batch of so many lines."""
    lines = (
        {
            "custom_id": f"l{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"p{number}", **LINE},
        }
        for number in range(count)
    )
    content = "\n".join(map(json.dumps, lines)).encode()
    file = http.post("files", files={"file": content}, data={"purpose": "batch"}).raise_for_status().json()["id"]
    body = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    name: str = http.post("batches", json=body).raise_for_status().json()["id"]
    return name


def wait_for(http: httpx.Client, name: str, count: int) -> dict[str, Any]:
    """The batch, once so many of its lines are done."""
    while True:
        batch: dict[str, Any] = http.get(f"batches/{name}").raise_for_status().json()
        if batch["status"] in ("completed", "failed") or batch["request_counts"]["completed"] >= count:
            return batch
        time.sleep(0.1)


def shown(name: str, found: list[float]) -> str:
    """Of a list of TPOTs."""
    high = statistics.quantiles(found, n=100)[98] if len(found) > 1 else max(found, default=0.0)
    return f"{name}: TPOT median {statistics.median(found or [0.0]):.2f} ms, p99 {high:.2f} ms, {len(found)} requests"


def run(options: argparse.Namespace, state: Path) -> int:
    """Measure; the exit code."""
    flags = [*([options.model] if options.model else []), "--state-dir", str(state)]
    server = Server(flags, state / "log")
    print(shown("alone", asyncio.run(clients(server.url, options.clients, options.seconds))), flush=True)
    with httpx.Client(base_url=server.url, timeout=300) as http:
        name = submit(http, options.lines)
        wait_for(http, name, 1)
        print(shown("beside a batch", asyncio.run(clients(server.url, options.clients, options.seconds))), flush=True)
        half = wait_for(http, name, options.lines // 2)
    print(f"killed with {half['request_counts']['completed']} lines done", flush=True)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    server = Server(flags, state / "log")
    with httpx.Client(base_url=server.url, timeout=300) as http:
        done = wait_for(http, name, options.lines + 1)
        content = http.get(f"files/{done['output_file_id']}/content").raise_for_status().text
    server.end()
    names = Counter(json.loads(line)["custom_id"] for line in content.splitlines())
    lost = options.lines - len(names)
    doubled = sum(count - 1 for count in names.values())
    print(f"{options.lines} lines, a restart in the middle: lost {lost}, doubled {doubled}")
    return 1 if lost or doubled else 0


def main() -> int:
    """Run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--model", help="a directory; left out: the embedded model")
    with tempfile.TemporaryDirectory() as directory:
        return run(parser.parse_args(), Path(directory))


if __name__ == "__main__":
    sys.exit(main())
