"""How far `quire simulate` is from real runs: python benchmarks/simulation.py MODEL [--requests N] [--json FILE]

A run under the first setting is recorded and a line is fitted to its steps. Every other setting is then predicted, with
that line and the same requests, and run. Requests come at random (Poisson), at half of what the first burst shows the
machine to manage, with lengths of the repository's workload W2 cut to a quarter.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import tempfile
from pathlib import Path
from typing import Any

from quire import AsyncLLM, SamplingParams
from quire.observe.replay import read, replay
from quire.observe.simulate import arrivals, recorded, simulate
from quire.observe.step_cost import fit

SETTINGS: dict[str, tuple[float, dict[str, int]]] = {
    "as fitted": (1.0, {}),
    "4 rows": (1.0, {"max_num_seqs": 4}),
    "64 tokens a step": (1.0, {"max_num_batched_tokens": 64}),
    "40 blocks": (1.0, {"num_gpu_blocks_override": 40}),
    "1.5 times the rate": (1.5, {}),
    "1.5 times the rate, 4 rows": (1.5, {"max_num_seqs": 4}),
}
SCHEDULER_NAMES = {"num_gpu_blocks_override": "num_blocks"}
FIGURES = ("output_tokens_per_s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s")


def requests(count: int, vocab_size: int) -> list[tuple[list[int], int]]:
    """Prompts of token ids, and tokens to generate."""
    rng = random.Random(0)
    low, high = min(300, vocab_size // 2), min(8000, vocab_size)
    return [([rng.randrange(low, high) for _ in range(rng.randint(8, 128))], rng.randint(4, 64)) for _ in range(count)]


async def run(model: str, path: Path, count: int, rate: float, settings: dict[str, int]) -> None:
    """One recorded run. A rate of 0: all at once."""
    usual = {"max_num_seqs": 16, "num_gpu_blocks_override": 400, "max_model_len": 512, "max_num_batched_tokens": 512}
    llm = AsyncLLM(model, record=str(path), **{**usual, **settings})
    rng = random.Random(1)

    async def one(prompt: list[int], num_output: int, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        params = SamplingParams(max_tokens=num_output, ignore_eos=True, temperature=0.0)
        async for _ in llm.generate({"prompt_token_ids": prompt}, params):
            pass

    delay_s, tasks = 0.0, []
    for prompt, num_output in requests(count, llm.vocab_size):
        delay_s += rng.expovariate(rate) if rate else 0.0
        tasks.append(one(prompt, num_output, delay_s))
    await asyncio.gather(*tasks)
    llm.close()


def main() -> None:
    """Run, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        burst = Path(folder) / "burst"
        asyncio.run(run(options.model, burst, options.requests, 0.0, {}))
        rate = 0.5 * options.requests / recorded(read(str(burst))).duration_s
        cost = None
        for name, (factor, settings) in SETTINGS.items():
            path = Path(folder) / "run"
            path.unlink(missing_ok=True)
            asyncio.run(run(options.model, path, options.requests, rate * factor, settings))
            played = replay(str(path))
            sessions = read(str(path))
            if cost is None:
                cost, error = fit(sessions)
                print(f"load {os.getloadavg()[0]:.1f}, {platform.machine()}, {rate:.2f} requests/s")
                print(f"cost of a step {cost}, half within {error:.0%}")
            said = simulate(sessions[0], arrivals(sessions), cost).numbers()
            was = recorded(sessions).numbers()
            rows.append(
                {"setting": name, "plans": played.num_plans, "equal": played.num_equal, "was": was, "said": said}
            )
            errors = ", ".join(
                f"{key} {was[key]:.4g} -> {said[key]:.4g} ({said[key] / was[key] - 1:+.0%})" for key in FIGURES
            )
            print(f"{name}: replayed {played.num_equal} of {played.num_plans} plans; {errors}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
