"""What share of the peak of AMX the large GEMMs of a prompt reach: both in turns, in one process.

    python benchmarks/prefill_rate.py MODEL [--tokens 2048] [--runs 15] [--quantization int8]

A run is one prompt; what each of its GEMMs took is counted where it ran. GEMMs of loaded tiles alone, on all
threads (the faster of two ways, as in `kernels.py`), surround a run.
"""

import argparse
import random
import statistics
import time
from collections import defaultdict

import numpy as np

from quire import LLM, SamplingParams
from quire.bench.profile import between, operation_times
from quire.ops.cpu import CpuOps, operation_counts
from quire.ops.select import select_ops

ROUNDS = 8  # of each probe, before a run and after it


def unit_rate(ops: CpuOps, probes: tuple[str, ...]) -> float:
    """Operations a second: the faster of the two ways, each the median of its rounds."""
    nothing = np.empty(0, np.uint8)
    medians = []
    for probe in probes:
        rates = []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            rates.append(ops.probe(probe, nothing) / (time.perf_counter() - begun))
        medians.append(statistics.median(rates))
    return max(medians)


def product_rates(llm: LLM, num_tokens: int, run: int) -> dict[str, float]:
    """Operations a second of each GEMM that a prompt of its own runs with many rows."""
    draw = random.Random(run)
    prompt = {"prompt_token_ids": [draw.randrange(1000, 8000) for _ in range(num_tokens)]}
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    before = operation_times(operation_counts())
    llm.generate([prompt], params, use_tqdm=False)
    done = between(before, operation_times(operation_counts()))
    gemms = [one for one in done if one.operations_per_row and (one.max_rows is None or one.max_rows > 128)]
    rates = {one.operation: one.rows * one.operations_per_row / one.seconds for one in gemms}
    rates["all GEMMs"] = sum(one.rows * one.operations_per_row for one in gemms) / sum(o.seconds for o in gemms)
    return rates


def main() -> None:
    """Print the medians: of the rates, and of the shares of single runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--quantization")
    options = parser.parse_args()
    llm = LLM(model=options.model, quantization=options.quantization, max_model_len=8192, max_num_seqs=2)
    ops, _ = select_ops("cpu", None)
    assert isinstance(ops, CpuOps)
    kind = "bfloat16" if options.quantization is None else "int8"
    probes = kind, f"{kind}_four_tiles"
    product_rates(llm, options.tokens, 99)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for run in range(options.runs):
        unit = unit_rate(ops, probes)
        rates = product_rates(llm, options.tokens, run)
        unit = (unit + unit_rate(ops, probes)) / 2
        for name, rate in rates.items():
            found[name].append((rate, rate / unit))
        found[f"the unit ({kind})"].append((unit, 1.0))
    for name, pairs in found.items():
        rate, share = (statistics.median(column) for column in zip(*pairs, strict=True))
        low, high = min(one for _, one in pairs), max(one for _, one in pairs)
        print(f"{name:<36} {rate / 1e12:5.2f} TOP/s   {share:.2f} of the unit ({low:.2f} to {high:.2f})", flush=True)


if __name__ == "__main__":
    main()
