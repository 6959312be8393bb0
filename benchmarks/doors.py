"""What each of the server's doors costs over `LLM`: the same prompts, as many tokens, 16 clients at once.

    python -m benchmarks.doors [MODEL] [--rounds 5] [--clients 16] [--requests 48] [--tokens 64]

Prompts are chats of 32 to 512 characters; an answer has `--tokens` tokens where the model does not end it before, at
temperature 0. `LLM` answers all at once, with its core in another process as under the server. Doors and `LLM` take
turns, round after round, so that what else the machine does falls on all. There is no prefix cache: a core gives its
blocks back after half a minute of rest, and `LLM` rests for as long as six doors take. A line is the median over the
rounds, the smallest and the largest, and what it is of `LLM` and of OpenAI's door.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from quire import LLM, SamplingParams
from scripts.served import Server

Body = dict[str, Any]
NAME = "m"


def chats(count: int) -> list[list[dict[str, str]]]:
    """Conversations of different lengths, the same each time."""
    chance = random.Random(0)
    letters = "abcdefghij klmnopqrs tuvwxyz "
    return [
        [{"role": "user", "content": "".join(chance.choices(letters, k=chance.randint(32, 512)))}] for _ in range(count)
    ]


def openai(messages: Any, tokens: int, *, stream: bool) -> Body:
    """A body of /v1/chat/completions."""
    more = {"stream_options": {"include_usage": True}} if stream else {}
    return {"model": NAME, "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": stream, **more}


def anthropic(messages: Any, tokens: int, *, stream: bool) -> Body:
    """A body of /v1/messages."""
    return {"model": NAME, "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": stream}


def ollama(messages: Any, tokens: int, *, stream: bool) -> Body:
    """A body of /api/chat."""
    options = {"num_predict": tokens, "temperature": 0}
    return {"model": NAME, "messages": messages, "options": options, "stream": stream}


def _counts(value: Any) -> list[int]:
    usage = value.get("usage") or {}
    found = [usage.get("completion_tokens"), usage.get("output_tokens"), value.get("eval_count")]
    return [count for count in found if count is not None]


DOORS: dict[str, tuple[str, Callable[..., Body]]] = {
    "openai": ("/v1/chat/completions", openai),
    "anthropic": ("/v1/messages", anthropic),
    "ollama": ("/api/chat", ollama),
}


async def serve_all(url: str, door: str, asked: list[Any], options: argparse.Namespace, *, stream: bool) -> float:
    """Tokens a second of one door."""
    path, make = DOORS[door]
    places, total = asyncio.Semaphore(options.clients), 0
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:

        async def one(messages: Any) -> None:
            nonlocal total
            last: list[int] = [0]
            async with (
                places,
                client.stream("POST", url + path, json=make(messages, options.tokens, stream=stream)) as got,
            ):
                got.raise_for_status()
                async for line in got.aiter_lines():
                    text = line.removeprefix("data: ")
                    if text.startswith("{"):
                        last = _counts(json.loads(text)) or last
            total += last[-1]

        begun_s = time.perf_counter()
        await asyncio.gather(*(one(messages) for messages in asked))
        return total / (time.perf_counter() - begun_s)


def library(llm: LLM, asked: list[Any], options: argparse.Namespace) -> float:
    """Tokens a second of `LLM`."""
    params = SamplingParams(max_tokens=options.tokens, temperature=0)
    begun_s = time.perf_counter()
    outputs = llm.chat(asked, params, use_tqdm=False)
    total = sum(len(output.outputs[0].token_ids) for output in outputs)
    return total / (time.perf_counter() - begun_s)


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="left out: the embedded one")
    for name, usual in (("rounds", 5), ("clients", 16), ("requests", 48), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    options = parser.parse_args()
    model, asked = [] if options.model is None else [options.model], chats(options.requests)
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        flags = ["--max-num-seqs", str(options.clients), "--no-enable-prefix-caching"]
        server = Server([*model, "--served-model-name", NAME, *flags], Path(folder) / "log")
        stack.callback(server.end)
        llm = LLM(*model, core_process=True, max_num_seqs=options.clients, enable_prefix_caching=False)
        stack.callback(llm.close)
        url = server.url.removesuffix("/v1")
        for number in range(options.rounds + 1):  # the first warms up
            found = {"LLM": library(llm, asked, options)}
            for stream in (True, False):
                for door in DOORS:
                    kind = f"{door}, {'streamed' if stream else 'whole'}"
                    found[kind] = asyncio.run(serve_all(url, door, asked, options, stream=stream))
            for kind, rate in found.items() if number else ():
                rates.setdefault(kind, []).append(rate)
    show(rates)
    return 0


def show(rates: dict[str, list[float]]) -> None:
    """A line for each; ratios are medians of the rounds' own, since rounds differ more than doors do."""
    print(f"{'':22} {'tok/s':>9} {'smallest':>9} {'largest':>9} {'of LLM':>7} {'of openai':>9}")
    for kind, found in rates.items():
        peer = rates.get(f"openai, {kind.partition(', ')[2]}", found)
        of_library, of_peer = (
            statistics.median(own / other for own, other in zip(found, others, strict=True))
            for others in (rates["LLM"], peer)
        )
        shown = f"{statistics.median(found):9.1f} {min(found):9.1f} {max(found):9.1f}"
        print(f"{kind:22} {shown} {of_library:7.3f} {of_peer:9.3f}")


if __name__ == "__main__":
    sys.exit(main())
