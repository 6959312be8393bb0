"""What share of the machine's streaming read one decoding stream reaches: both in turns, in one process.

    python benchmarks/decode_bandwidth.py MODEL [--runs 9] [--quantization int8]

A run is W1 of `quire bench throughput` (128 tokens in, 128 out) without its first token; each of the others reads all
weights once, and nothing else of size. The reads of `kernels.py` (512 MB, all threads) surround a run.
"""

import argparse
import statistics
import time

import numpy as np

from quire import LLM, SamplingParams
from quire.bench.profile import between, operation_times
from quire.bench.workloads import single_stream
from quire.ops.cpu import CpuOps, operation_counts
from quire.ops.select import select_ops

READ_BYTES = 1 << 29
READS = 3  # before a run, and as many after it


def decode(llm: LLM, run: int) -> float:
    """Bytes of weights that one stream reads in a second."""
    (item,) = single_stream(run, 8000)
    params = SamplingParams(temperature=0.0, max_tokens=item.num_output, ignore_eos=True, detokenize=False)
    before = operation_times(operation_counts())
    (output,) = llm.generate([{"prompt_token_ids": item.prompt_token_ids}], params, use_tqdm=False)
    done = between(before, operation_times(operation_counts()))
    metrics = output.metrics
    assert metrics is not None and metrics.first_token_s is not None and metrics.last_token_s is not None
    read = sum(one.calls * one.weight_bytes for one in done if one.max_rows == 1)
    first = sum(one.weight_bytes for one in done if one.max_rows == 1 and one.operation.startswith("greedy"))
    return (read - first) / (metrics.last_token_s - metrics.first_token_s)


def read_rates(ops: CpuOps, data: np.ndarray) -> list[float]:
    """Bytes a second of each read."""
    rates = []
    for _ in range(READS):
        begun = time.perf_counter()
        rates.append(ops.probe("read", data) / (time.perf_counter() - begun))
    return rates


def main() -> None:
    """Print each run and the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--quantization")
    options = parser.parse_args()
    llm = LLM(model=options.model, quantization=options.quantization, max_model_len=512, max_num_seqs=8)
    ops, _ = select_ops("cpu", None)
    assert isinstance(ops, CpuOps)
    data = np.ones(READ_BYTES, np.uint8)
    decode(llm, 99)
    shares = []
    for run in range(options.runs):
        reads = read_rates(ops, data)
        weights = decode(llm, run)
        read = statistics.median(reads + read_rates(ops, data))
        shares.append(weights / read)
        print(f"weights {weights / 1e9:5.1f} GB/s   read {read / 1e9:5.1f} GB/s   {shares[-1]:.2f}", flush=True)
    print(f"share of the read: {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})")


if __name__ == "__main__":
    main()
