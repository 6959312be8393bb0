"""Load on a running server, and what its clients see: requests that come at their own times, or so many at once.

The figures have the names that `vllm bench serve` gives them, and its definitions: TTFT from sending a request to its
first token, TPOT the mean time of each further token of a request, ITL the time between two chunks of a stream, E2EL
the whole.
"""

import math
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from quire.engine.percentiles import percentile as percentile

LOWEST_ID, HIGHEST_ID = 300, 3000
"""Ordinary tokens of any vocabulary."""
WORDS = "time year people way day thing life child world school state family student group country problem".split()
METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True, slots=True)
class Load:
    """One request of a benchmark."""

    prompt: str | list[int]
    num_prompt: int
    """Tokens, or words of a text."""
    num_output: int


@dataclass(slots=True)
class Seen:
    """What a client saw of one request. Times are seconds since the benchmark began."""

    load: Load
    sent_s: float = 0.0
    chunks_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    num_prompt: int = 0
    num_output: int = 0
    text: str = ""
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.chunks_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Seconds for each token after the first; 0 where there is none."""
        return (self.chunks_s[-1] - self.chunks_s[0]) / (self.num_output - 1) if self.num_output > 1 else 0.0

    @property
    def itl_s(self) -> list[float]:
        """Seconds between chunks."""
        return [after - before for before, after in zip(self.chunks_s, self.chunks_s[1:], strict=False)]

    @property
    def e2el_s(self) -> float:
        """Seconds to the end."""
        return self.chunks_s[-1] - self.sent_s


@dataclass(frozen=True, slots=True)
class Chunk:
    """An event of a stream: its text, and the counts of tokens where it tells them."""

    text: str
    num_prompt: int | None = None
    num_output: int | None = None


Ask = Callable[[Load], Iterator[Chunk]]
"""Sends a request, in a thread of its own. QuireError where the server refuses."""


def random_loads(
    count: int, num_input: int, num_output: int, range_ratio: float, num_prefix: int, seed: int, *, as_text: bool
) -> list[Load]:
    """Random tokens, or words.

    Args:
        range_ratio: lengths are spread evenly over this share below and above, in [0, 1).
        num_prefix: tokens that all begin with.
        as_text: words, where a server takes no token ids; of many vocabularies one is a token.
    """
    rng = random.Random(seed)

    def length(mean: int) -> int:
        low, high = math.floor(mean * (1 - range_ratio)), math.ceil(mean * (1 + range_ratio))
        return max(1, rng.randint(low, high))

    prefix = _prompt(rng, num_prefix)
    return [_load(rng, prefix, length(num_input), length(num_output), as_text=as_text) for _ in range(count)]


def loads_of(lengths: Sequence[tuple[int, int]], seed: int, *, as_text: bool) -> list[Load]:
    """Random tokens, or words, for prompts and answers of these lengths."""
    rng = random.Random(seed)
    return [_load(rng, [], num_input, num_output, as_text=as_text) for num_input, num_output in lengths]


def _prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(LOWEST_ID, HIGHEST_ID) for _ in range(length)]


def _load(rng: random.Random, prefix: list[int], num_input: int, num_output: int, *, as_text: bool) -> Load:
    ids = prefix + _prompt(rng, num_input)
    prompt = " ".join(WORDS[token % len(WORDS)] for token in ids) if as_text else ids
    return Load(prompt, len(ids), num_output)


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """When requests are sent, in seconds from the beginning.

    Args:
        rate: requests a second; infinity: all at once.
        burstiness: 1: at random (Poisson); below: in bursts; above: more evenly. Gaps are Gamma with this shape.
    """
    if math.isinf(rate):
        return [0.0] * count
    rng, now_s, found = random.Random(seed), 0.0, []
    for _ in range(count):
        found.append(now_s)
        now_s += rng.gammavariate(burstiness, 1 / (rate * burstiness))
    return found


def run(
    loads: Sequence[Load],
    arrivals_s: Sequence[float],
    ask: Ask,
    max_concurrency: int | None,
    on_end: Callable[[Seen], None] = lambda seen: None,
) -> tuple[list[Seen], float]:
    """Send all requests; what was seen of each in their order, and the seconds that it took.

    Args:
        max_concurrency: no more are open at a time; those that are due wait. None: no bound.
        on_end: called for each request when it has ended, from any thread.
    """
    seen = [Seen(load) for load in loads]
    begun_s = time.perf_counter()
    lock = threading.Lock()

    def one(item: Seen) -> None:
        item.sent_s = time.perf_counter() - begun_s
        try:
            _receive(item, ask, begun_s)
        except Exception as error:  # noqa: BLE001 -- a request that fails is counted, whatever it failed of
            item.error = f"{type(error).__name__}: {error}"
        item.end_s = time.perf_counter() - begun_s
        with lock:
            on_end(item)

    with ThreadPoolExecutor(max_concurrency or max(1, len(loads)), thread_name_prefix="quire-bench") as pool:
        for item, due_s in sorted(zip(seen, arrivals_s, strict=True), key=lambda pair: pair[1]):
            time.sleep(max(0.0, begun_s + due_s - time.perf_counter()))
            pool.submit(one, item)
    return seen, time.perf_counter() - begun_s


def _receive(item: Seen, ask: Ask, begun_s: float) -> None:
    num_chunks = 0
    for chunk in ask(item.load):
        if chunk.text or chunk.num_output is None:
            item.chunks_s.append(time.perf_counter() - begun_s)
            item.text += chunk.text
            num_chunks += 1
        item.num_prompt = chunk.num_prompt or item.num_prompt
        item.num_output = chunk.num_output or item.num_output
    item.num_output = item.num_output or num_chunks
    item.num_prompt = item.num_prompt or item.load.num_prompt
    if not item.chunks_s:
        raise ValueError("the stream had no token")


def result(
    seen: Sequence[Seen],
    duration_s: float,
    percents: Sequence[float],
    goodput_ms: dict[str, float],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """The figures, under vLLM's names.

    Args:
        percents: percentiles that are reported.
        goodput_ms: `ttft`, `tpot` and `e2el` that a good request keeps, in milliseconds; empty: none is asked for.
        facts: what was run: stands before the figures.
    """
    done = [one for one in seen if one.error is None]
    found: dict[str, Any] = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        **facts,
        "duration": duration_s,
        "completed": len(done),
        "failed": len(seen) - len(done),
        "total_input_tokens": sum(one.num_prompt for one in done),
        "total_output_tokens": sum(one.num_output for one in done),
        "request_throughput": len(done) / duration_s,
        "request_goodput": sum(_is_good(one, goodput_ms) for one in done) / duration_s if goodput_ms else None,
        "output_throughput": sum(one.num_output for one in done) / duration_s,
        "total_token_throughput": sum(one.num_prompt + one.num_output for one in done) / duration_s,
        **_most(done),
        "input_lens": [one.num_prompt for one in seen],
        "output_lens": [one.num_output for one in seen],
        "ttfts": [one.ttft_s if one.error is None else 0.0 for one in seen],
        "itls": [one.itl_s for one in seen],
        "latencies": [one.e2el_s if one.error is None else 0.0 for one in seen],
        "start_times": [one.sent_s for one in seen],
        "generated_texts": [one.text for one in seen],
        "errors": [one.error or "" for one in seen],
    }
    values = {
        "ttft": [one.ttft_s for one in done],
        "tpot": [one.tpot_s for one in done if one.num_output > 1],
        "itl": [gap for one in done for gap in one.itl_s],
        "e2el": [one.e2el_s for one in done],
    }
    for name in METRICS:
        milliseconds = [value * 1e3 for value in values[name]]
        found[f"mean_{name}_ms"] = statistics.fmean(milliseconds) if milliseconds else 0.0
        found[f"median_{name}_ms"] = percentile(milliseconds, 50)
        found[f"std_{name}_ms"] = statistics.pstdev(milliseconds) if milliseconds else 0.0
        found |= {f"p{percent:g}_{name}_ms": percentile(milliseconds, percent) for percent in percents}
    return found


def _most(done: Sequence[Seen]) -> dict[str, float]:
    """Of any second since the first request was sent: chunks that came in it, and requests that were open in it."""
    first_s = min((one.sent_s for one in done), default=0.0)
    tokens = Counter(int(at_s - first_s) for one in done for at_s in one.chunks_s)
    is_open = Counter(
        second for one in done for second in range(int(one.sent_s - first_s), int(one.chunks_s[-1] - first_s) + 1)
    )
    return {
        "max_output_tokens_per_s": float(max(tokens.values(), default=0)),
        "max_concurrent_requests": max(is_open.values(), default=0),
    }


def _is_good(one: Seen, bounds_ms: dict[str, float]) -> bool:
    seconds = {"ttft": one.ttft_s, "tpot": one.tpot_s, "e2el": one.e2el_s}
    return all(seconds[name] * 1e3 <= bound for name, bound in bounds_ms.items())
