"""Plain `transformers` on the same device and requests as `cuda_model.py`'s part `mixed`: one JSON object.

    python benchmarks/cuda_peers.py DIRECTORY static|continuous [--device cpu] [--scale N] [--batch-size 32]

`static`: `generate` in batches in the order of the requests, padded on the left, each until its longest output is done.
`continuous`: its own continuous batching over a paged cache (CUDA alone). bfloat16, sdpa, greedy.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from cuda_model import mixed_items, prompt
from transformers import AutoModelForCausalLM, GenerationConfig

from quire.bench.workloads import Item


def _generate(model: Any, items: list[Item], begun: float) -> list[float]:
    """One padded batch; seconds from `begun` to each request's first token."""
    width, outputs = max(len(item.prompt_token_ids) for item in items), max(item.num_output for item in items)
    padding = [width - len(item.prompt_token_ids) for item in items]
    ids = torch.tensor([[0] * pad + item.prompt_token_ids for pad, item in zip(padding, items, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
    times: list[float] = []

    def seen(_: Any, logits: Any) -> Any:
        if model.device.type == "cuda" and not times:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return logits

    model.generate(
        ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False, max_new_tokens=outputs,
        min_new_tokens=outputs, pad_token_id=0, logits_processor=[seen],
    )  # fmt: skip
    return [times[0] - begun] * len(items)


def static(model: Any, items: list[Item], batch_size: int) -> tuple[float, list[float]]:
    """Seconds for all, and to each first token."""
    begun, waits = time.perf_counter(), []
    for start in range(0, len(items), batch_size):
        waits += _generate(model, items[start : start + batch_size], begun)
    return time.perf_counter() - begun, waits


def continuous(model: Any, items: list[Item]) -> tuple[float, list[float]]:
    """The same with its continuous batching; each request has its own length."""
    config = GenerationConfig(do_sample=False, max_new_tokens=max(item.num_output for item in items), eos_token_id=-1)
    with model.continuous_batching_context_manager(generation_config=config) as manager:
        begun = time.perf_counter()
        for item in items:
            manager.add_request(item.prompt_token_ids, max_new_tokens=item.num_output, record_timestamps=True)
        waits: list[float] = []
        while len(waits) < len(items):
            output = manager.get_result(timeout=60)
            if output is None or output.error is not None:
                raise RuntimeError(f"continuous batching gave no result: {output and output.error}")
            if output.is_finished():
                waits.append(output.timestamps[0] - begun)
        return time.perf_counter() - begun, waits


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("way", choices=("static", "continuous"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    attention = "sdpa" if arguments.way == "static" else "paged|sdpa"
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(arguments.directory, dtype=torch.bfloat16, attn_implementation=attention).to(arguments.device).eval()
    vocabulary = model.config.vocab_size
    items = mixed_items(max(2, 256 // arguments.scale), arguments.scale, vocabulary)
    few = [Item(prompt(3, 16, vocabulary), 4)]
    if arguments.way == "static":
        static(model, few, 1)
        seconds, waits = static(model, items, arguments.batch_size)
    else:
        continuous(model, few)
        seconds, waits = continuous(model, items)
    used = None
    if arguments.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        used = 1 - free / total
    tokens = sum(len(item.prompt_token_ids) + item.num_output for item in items)
    mixed = {
        "tokens_per_s": tokens / seconds, "output_tokens_per_s": sum(item.num_output for item in items) / seconds,
        "ttft_median_s": statistics.median(waits), "memory_in_use": used,
    }  # fmt: skip
    print(json.dumps({"engine": f"transformers {transformers.__version__} {arguments.way}", "mixed": mixed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
