"""What a viewer of `/ui` costs: tokens a second with one and without, in turns, and its share of a processor.

    python -m benchmarks.viewing [MODEL] [--rounds 5] [--every 0.1] [--requests 256] [--steps 20]

First, without a server, a view of `--requests` that decode at `--steps` a second is asked for frames as the stream asks
it: the share of one core that these take, by the clock of this process, and what noting a step takes more of it than
where there is no viewer. Then W2 (32 requests at once, over HTTP) runs by itself and beside a viewer that takes a frame
in `--every` seconds, round after round in turns: medians, the smallest and the largest of each, and their quotient.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec

from quire.bench.workloads import WORKLOADS
from quire.core.plan import StepRecord
from quire.core.request import NewRequest, SamplingSpec
from quire.observe.live import LiveView
from scripts.served import Server

VOCABULARY = 300
"""Ids that every model has."""
PROMPT, BLOCK = 512, 16
FRAMES = 200
TIMEOUT_S = 3600.0


def w2(url: str, round_: int) -> float:
    """Output tokens a second."""
    items = WORKLOADS["W2"](round_, VOCABULARY)

    def ask(at: int) -> None:
        item = items[at]
        body = {"prompt": item.prompt_token_ids, "max_tokens": item.num_output, "ignore_eos": True}
        httpx.post(f"{url}/completions", json=body, timeout=TIMEOUT_S).raise_for_status()

    start = time.perf_counter()
    with ThreadPoolExecutor(len(items)) as pool:
        list(pool.map(ask, range(len(items))))
    return sum(item.num_output for item in items) / (time.perf_counter() - start)


@contextmanager
def viewer(url: str, every: float) -> Iterator[None]:
    """Reads the stream until the end of the block."""
    ends = threading.Event()

    def read() -> None:
        with httpx.stream("GET", f"{url}/ui/frames", params={"every": every}, timeout=TIMEOUT_S) as answer:
            for _ in answer.iter_raw():
                if ends.is_set():
                    return

    thread = threading.Thread(target=read)
    thread.start()
    yield
    ends.set()
    thread.join()


def beside(model: list[str], rounds: int, every: float) -> None:
    """With a viewer and without, in turns."""
    found: dict[str, list[float]] = {"no viewer": [], "a viewer": []}
    with tempfile.TemporaryDirectory() as folder:
        server = Server([*model, "--max-num-seqs", "32"], Path(folder) / "log")
        try:
            root = server.url.removesuffix("/v1")
            w2(server.url, rounds)  # warm
            for round_ in range(rounds):
                for name in sorted(found, reverse=round_ % 2 == 0):
                    if name == "no viewer":
                        found[name].append(w2(server.url, round_))
                        continue
                    with viewer(root, every):
                        found[name].append(w2(server.url, round_))
        finally:
            server.process.terminate()
            server.process.wait()
    for name, rates in found.items():
        print(f"W2, {name:10} {statistics.median(rates):8.1f} tokens/s ({min(rates):.1f} to {max(rates):.1f})")
    alone, watched = (statistics.median(rates) for rates in found.values())
    print(f"a viewer costs {100 * (1 - watched / alone):.1f} % (median of {rounds} rounds, a frame each {every} s)")


def share(num_requests: int, steps_per_s: int, every: float) -> None:
    """Of one core, for the frames of a stream."""
    view, alone, rows = LiveView(BLOCK, weight_bytes=1), LiveView(BLOCK), range(num_requests)
    per_request = -(-PROMPT // BLOCK) + 1
    for row in rows:
        new = NewRequest(str(row), tuple(range(PROMPT)), 4096, SamplingSpec(), arrival_s=0.0)
        for one in (view, alone):
            one.add(new, f"cmpl-{row:032x}", 0)
    given = tuple((str(row), tuple(range(row * per_request, (row + 1) * per_request))) for row in rows)
    since, taken_s, more_s, num_bytes, step = -1, 0.0, 0.0, 0, 0
    for at in range(FRAMES):
        while step / steps_per_s <= at * every:
            scheduled = tuple((str(row), PROMPT + step, 1) for row in rows)
            grown = tuple((name, (num_requests * per_request + row,)) for row, (name, _) in enumerate(given))
            blocks = given if step == 0 else grown if step % BLOCK == 0 else ()
            noted = record(step, step / steps_per_s, scheduled, blocks)
            times = [time.process_time()]
            for one in (alone, view):
                one.observe(noted)
                times.append(time.process_time())
            more_s += times[2] - times[1] - (times[1] - times[0])
            step += 1
        start = time.process_time()
        found = view.frame(since)
        data = b"data: " + msgspec.json.encode({**found, "model": "m", "max_model_len": 8192, "is_ready": True})
        taken_s += (time.process_time() - start) if at else 0.0
        since, num_bytes = found["version"], num_bytes + (len(data) if at else 0)
    each_s, noting = taken_s / (FRAMES - 1), more_s / (FRAMES * every)
    size = num_bytes / (FRAMES - 1) / 1e3
    print(f"{num_requests} requests at {steps_per_s} steps/s: {each_s * 1e3:.2f} ms and {size:.0f} KB a frame")
    print(
        f"of a core: frames {100 * each_s / every:.2f} % with one each {every} s, notes of steps {100 * noting:.2f} %"
    )


def record(
    step: int,
    now_s: float,
    scheduled: tuple[tuple[str, int, int], ...],
    blocks: tuple[tuple[str, tuple[int, ...]], ...],
) -> StepRecord:
    """Of a step that only decodes."""
    num = len(scheduled)
    return StepRecord(step, now_s, scheduled, (), num, 0, 0, 0, num * 512, 0, 0, blocks)


def main() -> None:
    """Both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", help="the embedded one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--every", type=float, default=0.1)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    share(options.requests, options.steps, options.every)
    beside(options.model, options.rounds, options.every)


if __name__ == "__main__":
    main()
