"""Kill the core of a server at random moments under load, and hold every stream against the undisturbed one.

    python -m scripts.kill_trials [--trials 25] [--streams 16] [--signal KILL|STOP|SEGV] [--hang-timeout S]
                                  [--model DIR] [--out FILE]

KILL is a death from outside, SEGV a crash (each request that was present is probed alone), STOP a core that hangs.

Each trial opens all streams, kills, and waits until they end. One JSON line a trial goes to `--out`, which is
appended to; the summary at the end is of all lines in it. Exit 1 when a stream was lost or differs. Linux only.
"""

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from scripts.served import Answer, Server, open_client, stream, until

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
    base = {"max_tokens": TOKENS, "ignore_eos": True}
    return [
        {**base, "prompt": f"Story {index}: " + "once upon a time " * (index % 5), "seed": index,
         **KINDS[index % len(KINDS)]}
        for index in range(count)
    ]  # fmt: skip


async def trial(
    client: httpx.AsyncClient, server: Server, whole: list[Answer], share: float, how: signal.Signals
) -> dict[str, Any]:
    """All streams, and a death when `share` of all that will be said has been said: so some are open, however fast
    the machine is just then."""
    asked = bodies(len(whole))
    seen = [0]
    tasks = [asyncio.ensure_future(stream(client, server.url, body, seen)) for body in asked]
    total = sum(len(part.text) for one in whole for part in one.parts.values())
    while seen[0] < share * total:
        await asyncio.sleep(0.001)
    num_open = sum(not task.done() for task in tasks)
    start_s = time.perf_counter()
    server.kill_core(how)
    detect_s = await until(client, server, 503, start_s)
    recover_s = await until(client, server, 200, start_s)
    found = await asyncio.gather(*tasks)
    equal = sum(item.parts == one.parts and item.end == "done" for item, one in zip(found, whole, strict=True))
    ends = sorted({item.end for item in found} - {"done"})
    return {
        "signal": how.name, "share": round(share, 4), "detect_s": round(detect_s, 4),
        "recover_s": round(recover_s, 4), "streams": len(whole), "open": num_open, "equal": equal,
        "longest_gap_s": round(max(item.gap_s for item in found), 4), "ends": ends,
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
    async with open_client() as client:
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
    arguments = [options.model] if options.model else []
    arguments += ["--hang-timeout", options.hang_timeout] if options.hang_timeout else []
    server = Server(arguments, options.out.with_suffix(".log"))
    try:
        lines = asyncio.run(run(options, server))
    finally:
        status = server.end()
    print(summary([json.loads(line) for line in options.out.read_text().splitlines()]))
    return 0 if status == 0 and all(line["equal"] == line["streams"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
