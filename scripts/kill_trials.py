"""Kill the core of a server at random moments under load, and hold every stream against the undisturbed one.

    python scripts/kill_trials.py [--trials 25] [--streams 16] [--signal KILL|STOP|SEGV] [--hang-timeout S]
                                  [--model DIR] [--out FILE]

KILL is a death from outside, SEGV a crash (whoever was present is tried alone), STOP a core that hangs.

Each trial opens all streams, kills, and waits until they end. One JSON line a trial goes to `--out`, which is
appended to; the summary at the end is of all lines in it. Exit 1 when a stream was lost or differs. Linux only.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

POLL_SECONDS = 0.004
TOKENS = 160
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "logprobs": 3},
    {"temperature": 1.0, "presence_penalty": 0.8, "frequency_penalty": 0.4, "logprobs": 1},
    {"temperature": 1.1, "top_k": 40, "repetition_penalty": 1.2, "min_tokens": 100, "ignore_eos": False},
    {"temperature": 1.0, "stop": ["zq", "\n\n\n"], "n": 2},
]


def bodies(count: int) -> list[dict[str, Any]]:
    """Requests of every kind, each with its own prompt and seed."""
    base = {"max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    return [
        {**base, "prompt": f"Story {index}: " + "once upon a time " * (index % 5), "seed": index,
         **KINDS[index % len(KINDS)]}
        for index in range(count)
    ]  # fmt: skip


class Server:
    """`quire serve` on a free port."""

    def __init__(self, model: str | None, hang_timeout: str | None) -> None:
        command = [sys.executable, "-m", "quire", "serve", *([model] if model else []), "--port", "0", "--quiet"]
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file
        command += ["--hang-timeout", hang_timeout] if hang_timeout else []
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        if "ready on " not in line:
            raise SystemExit(f"the server did not start: {line}{self.process.stderr.read()}")
        self.url = line.split("ready on ")[1].strip()

    def core_pid(self) -> int:
        """The child that computes."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return next(int(word) for path in tasks for word in path.read_text().split())


async def stream(client: httpx.AsyncClient, url: str, body: dict[str, Any], seen: list[int]) -> dict[str, Any]:
    """One answer put together, and the longest time between two events of it; `seen[0]` counts its characters."""
    parts: dict[int, list[Any]] = {}
    end, last_s, gap_s = "cut off", time.perf_counter(), 0.0
    async with client.stream("POST", f"{url}/completions", json=body) as response:
        if response.status_code != 200:
            return {"parts": {}, "end": f"status {response.status_code}", "gap_s": 0.0}
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            now_s = time.perf_counter()
            gap_s, last_s = max(gap_s, now_s - last_s), now_s
            if line == "data: [DONE]":
                end = "done"
                continue
            event = json.loads(line[6:])
            if "error" in event:
                end = event["error"]["message"]
            for choice in event.get("choices", ()):
                part = parts.setdefault(choice["index"], ["", [], None])
                part[0] += choice["text"]
                seen[0] += len(choice["text"])
                part[1] += (choice["logprobs"] or {}).get("token_logprobs", [])
                part[2] = choice["finish_reason"] or part[2]
    return {"parts": parts, "end": end, "gap_s": gap_s}


async def until(client: httpx.AsyncClient, server: Server, status: int, start_s: float) -> float:
    """Seconds since `start_s` until /readyz says `status`."""
    address = server.url.removesuffix("/v1") + "/readyz"
    while (await client.get(address)).status_code != status:
        if time.perf_counter() - start_s > 30:
            raise SystemExit(f"/readyz did not turn to {status} in 30 s")
        await asyncio.sleep(POLL_SECONDS)
    return time.perf_counter() - start_s


async def trial(
    client: httpx.AsyncClient, server: Server, whole: list[Any], share: float, how: signal.Signals
) -> dict[str, Any]:
    """All streams, and a death when `share` of all that will be said has been said: so some are open, however fast
    the machine is just then."""
    asked = bodies(len(whole))
    seen = [0]
    tasks = [asyncio.ensure_future(stream(client, server.url, body, seen)) for body in asked]
    total = sum(len(part[0]) for one in whole for part in one["parts"].values())
    while seen[0] < share * total:
        await asyncio.sleep(0.001)
    num_open = sum(not task.done() for task in tasks)
    start_s = time.perf_counter()
    os.kill(server.core_pid(), how)
    detect_s = await until(client, server, 503, start_s)
    recover_s = await until(client, server, 200, start_s)
    found = await asyncio.gather(*tasks)
    equal = sum(item["parts"] == one["parts"] and item["end"] == "done" for item, one in zip(found, whole, strict=True))
    ends = sorted({item["end"] for item in found} - {"done"})
    return {
        "signal": how.name, "share": round(share, 4), "detect_s": round(detect_s, 4),
        "recover_s": round(recover_s, 4), "streams": len(whole), "open": num_open, "equal": equal,
        "longest_gap_s": round(max(item["gap_s"] for item in found), 4), "ends": ends,
    }  # fmt: skip


def summary(lines: list[dict[str, Any]]) -> str:
    """What a report says."""

    def spread(name: str) -> str:
        values = sorted(line[name] for line in lines)
        return f"p50 {statistics.median(values):.3f}, max {values[-1]:.3f} s"

    num_streams, num_equal = sum(line["streams"] for line in lines), sum(line["equal"] for line in lines)
    return (
        f"{len(lines)} trials of {lines[0]['streams']} streams: detected {spread('detect_s')}; recovered "
        f"{spread('recover_s')}; longest silence on a stream {spread('longest_gap_s')}; "
        f"{sum(line['open'] for line in lines)} streams open at the kill; "
        f"{num_equal} of {num_streams} equal the undisturbed ones"
    )


async def run(options: argparse.Namespace, server: Server) -> list[dict[str, Any]]:
    """All trials on one server."""
    rng = random.Random(options.seed)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as client:
        whole = await asyncio.gather(*(stream(client, server.url, body, [0]) for body in bodies(options.streams)))
        lines = []
        for _ in range(options.trials):
            how = signal.Signals[f"SIG{options.signal}"]
            lines.append(await trial(client, server, whole, rng.random() * 0.8, how))
            with options.out.open("a") as out:
                out.write(json.dumps(lines[-1]) + "\n")
    return lines


def main() -> int:
    """Run, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--signal", choices=("KILL", "STOP", "SEGV"), default="KILL")
    parser.add_argument("--hang-timeout", metavar="S", help="of the server, seconds")
    parser.add_argument("--model", help="a directory; the embedded model")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="of the random moments")
    parser.add_argument("--out", type=Path, default=Path("build/kill_trials.jsonl"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    server = Server(options.model, options.hang_timeout)
    try:
        lines = asyncio.run(run(options, server))
        server.process.send_signal(signal.SIGTERM)
        status = server.process.wait(30)
    finally:
        server.process.kill()
    print(summary([json.loads(line) for line in options.out.read_text().splitlines()]))
    return 0 if status == 0 and all(line["equal"] == line["streams"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
