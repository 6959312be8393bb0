"""W1 and W2 of one model in several formats, in turns, in one process: tokens generated in a second.

    python benchmarks/requests_in_turns.py DIR --formats none int8 int4 fp8 --workload W1 W2 --reps 3
    python benchmarks/requests_in_turns.py DIR --formats none int4 --part 4 --threads 1      # a quarter of the lengths

W1 is one request, 128 tokens in and 128 out; W2 is 32 at once, 32 to 512 in, 16 to 256 out. With one thread a second is
of the processor, so that busy neighbours count little; with more it is of the wall.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

from quire import LLM, SamplingParams
from quire.cli.eval_formats import format_values

Lengths = list[tuple[int, int]]
"""Of a request: tokens in, tokens out."""


def lengths(workload: str, part: int) -> Lengths:
    """Of all requests; a `part` of them, but 4 at least."""
    chosen = random.Random(0)
    whole = (
        [(128, 128)] if workload == "W1" else [(chosen.randint(32, 512), chosen.randint(16, 256)) for _ in range(32)]
    )
    return [(max(4, given // part), max(4, out // part)) for given, out in whole]


def rate(llm: LLM, requests: Lengths, turn: int, clock: Callable[[], float]) -> float:
    """Tokens a second."""
    ids = random.Random(turn)
    prompts = [{"prompt_token_ids": [ids.randrange(300, 8000) for _ in range(given)]} for given, _ in requests]
    params = [SamplingParams(temperature=0, max_tokens=out, ignore_eos=True, detokenize=False) for _, out in requests]
    begun = clock()
    llm.generate(prompts, params, use_tqdm=False)
    return sum(out for _, out in requests) / (clock() - begun)


def main() -> None:
    """Print a line for each workload and format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--formats", nargs="+", default=["none", "int8", "int8_w8a8", "int4", "int4_min", "fp8"])
    parser.add_argument("--workload", nargs="+", default=["W1", "W2"], choices=["W1", "W2"])
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--part", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    clock = time.process_time if options.threads == 1 else time.perf_counter
    shared = {"threads": options.threads, "core_process": False, "max_model_len": 1024, "max_num_seqs": 32}
    models = {
        name: LLM(model=options.model, kv_cache_memory_bytes=2**29, **shared, **format_values(name))
        for name in options.formats
    }
    for workload in options.workload:
        requests = lengths(workload, options.part)
        found: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(options.reps + 1):
            for name, llm in models.items():
                found[name].append(rate(llm, requests, turn, clock))
        first = statistics.median(next(iter(found.values()))[1:])
        for name, rates in found.items():
            median = statistics.median(rates[1:])
            spread = f"{min(rates[1:]):,.1f} to {max(rates[1:]):,.1f}"
            print(f"{workload} {name:>26} {median:>9,.1f} tokens/s, {spread}; {median / first:.2f} x", flush=True)


if __name__ == "__main__":
    main()
