"""Time per token with and without a shape, and what forced text saves: one model, in turns.

    python benchmarks/structured_speed.py MODEL [--rows 1 8 32] [--rounds 3]

free     nothing is asked of the answer
regex    letters and spaces: a mask for every token, nothing forced
keys     a JSON object with long keys: their text is forced, and follows without a step for each token
keys, one by one
         the same with log-probabilities, for which each token is sampled
"""

import argparse
import statistics
import time
from typing import Any

from quire import LLM, SamplingParams
from quire.structured_params import StructuredOutputsParams

TOKENS = 96
KEYS = [f"a description of part number {number}" for number in range(6)]
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
SCHEMA = {"type": "object", "properties": dict.fromkeys(KEYS, DIGIT), "required": KEYS, "additionalProperties": False}
LETTERS = StructuredOutputsParams(regex="[a-z ]*")
OBJECT = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
MODES: dict[str, dict[str, Any]] = {
    "free": {"ignore_eos": True, "max_tokens": TOKENS},
    "regex": {"structured_outputs": LETTERS, "min_tokens": TOKENS, "max_tokens": TOKENS + 1},
    "keys": {"structured_outputs": OBJECT, "max_tokens": 400},
    "keys, one by one": {"structured_outputs": OBJECT, "max_tokens": 400, "logprobs": 0},
}


def main() -> None:
    """Print medians of milliseconds per token and row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with LLM(options.model, max_num_seqs=max(options.rows), max_model_len=2048) as llm:
        for mode in MODES:
            run(llm, mode, 1)  # compiles, and touches the memory
        for rows in options.rows:
            found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
            for _ in range(options.rounds):
                for mode in MODES:
                    found[mode].append(run(llm, mode, rows))
            for mode, pairs in found.items():
                per_token, steps = (statistics.median(values) for values in zip(*pairs, strict=True))
                print(f"{rows:3} rows  {mode:18} {1000 * per_token:8.2f} ms a token, {steps:.2f} steps a token")


def run(llm: LLM, mode: str, rows: int) -> tuple[float, float]:
    """Seconds by tokens of one row, and steps by them."""
    params = [SamplingParams(**{"temperature": 0.0, **MODES[mode]}) for _ in range(rows)]
    prompts = [{"prompt_token_ids": [100 + row, *range(200, 230)]} for row in range(rows)]
    before, begun = num_steps(llm), time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begun
    longest = max(len(output.outputs[0].token_ids) for output in outputs)
    return seconds / longest, (num_steps(llm) - before) / longest


def num_steps(llm: LLM) -> float:
    """Of the core so far."""
    return next(item.value for item in llm.get_metrics() if item.name == "quire:iteration_tokens_total")


if __name__ == "__main__":
    main()
