"""A whole model on a GPU beside what the device allows: one configuration, one process, one JSON object.

    python benchmarks/cuda_model.py DIRECTORY [--quantization NAME] [--variant] [--parts PART ...] [--device cpu]

    start    seconds from the process's start to the first token of a prompt of 8 (run twice: the second time the
             compiled kernels are there)
    decode   1, 32 and 256 sequences at once, 512 tokens in and 256 out: output tokens per second; and the floor: the
             time that weights and cache take through memory and prompts through the tensor cores, over the time taken
    ttft     prompts of 128, 2,048 and 8,192 tokens: milliseconds to the first token
    mixed    W2's lengths for 256 requests: tokens per second, median time to first token, memory in use

`--variant` turns row independence off. `--device cpu` with a tiny checkpoint and `--scale 16` (all lengths and counts
divided by it) shows that every line works.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from quire import LLM, SamplingParams
from quire.bench.offline import run_quire
from quire.bench.workloads import Item

PARTS = ("decode", "ttft", "mixed")


def process_age_s() -> float:
    """Seconds since this process began, imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def prompt(seed: int, count: int, vocabulary: int) -> list[int]:
    """Token ids that no other prompt begins with."""
    ids = random.Random(seed)
    return [ids.randrange(vocabulary // 4, vocabulary) for _ in range(count)]


def mixed_items(requests: int, scale: int, vocabulary: int) -> list[Item]:
    """W2's lengths, for more requests."""
    lengths = random.Random(0)
    shape = [(lengths.randint(32, 512), lengths.randint(16, 256)) for _ in range(requests)]
    return [
        Item(prompt(7000 + index, max(1, given // scale), vocabulary), max(2, asked // scale))
        for index, (given, asked) in enumerate(shape)
    ]


def limits(device: str) -> tuple[float, float]:
    """Bytes read or written per second by a copy, and floating-point operations per second of a matrix product."""
    is_cuda = device == "cuda"
    size, side, dtype = (1 << 30, 8192, torch.bfloat16) if is_cuda else (1 << 20, 128, torch.float32)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (torch.randn((side, side), dtype=dtype, device=device) for _ in range(2))

    def seconds(work: Any) -> float:
        found = []
        for _ in range(8):
            _wait(device)
            begun = time.perf_counter()
            work()
            _wait(device)
            found.append(time.perf_counter() - begun)
        return statistics.median(found)

    return 2 * size / seconds(lambda: target.copy_(source)), 2 * side**3 / seconds(lambda: a @ b)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Model:
    """What is measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        config = json.loads((arguments.directory / "config.json").read_text())
        self.device, self.scale, self.vocabulary = arguments.device, arguments.scale, int(config["vocab_size"])
        self.cache_bytes = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 2
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
        per_layer = hidden * config["head_dim"] * (heads + config["num_attention_heads"])
        self.parameters = layers * (per_layer + 3 * hidden * config["intermediate_size"])
        self.head = hidden * self.vocabulary
        bits = {None: 16, "int4": 4.5}.get(arguments.quantization, 8)
        self.weight_bytes = self.parameters * bits / 8 + self.head * (2 if arguments.quantization is None else 1)
        self.copy, self.rate = limits(arguments.device)
        room = {"gpu_memory_utilization": 0.96} if arguments.device == "cuda" else {"num_gpu_blocks_override": 512}
        self.llm = LLM(
            str(arguments.directory), device=arguments.device, dtype="bfloat16", quantization=arguments.quantization,
            max_model_len=max(64, 8448 // self.scale), max_num_seqs=max(4, 256 // self.scale),
            batch_invariant=not arguments.variant, enable_prefix_caching=False,
            **room,
        )  # fmt: skip

    def run(self, items: list[Item]) -> tuple[float, float | None]:
        """Seconds, and the median time to a first token."""
        return run_quire(self.llm, items)

    def first_token(self, count: int, seed: int) -> float:
        """Seconds from a prompt of so many tokens to its first token."""
        item = Item(prompt(seed, count, self.vocabulary), 1)
        return self.run([item])[0]

    def floor(self, items: list[Item]) -> float:
        """Seconds that no run of these can be under: prompts at the matrix rate, then steps at the memory's."""
        tokens = sum(len(item.prompt_token_ids) for item in items)
        steps = max(item.num_output for item in items) - 1
        read = sum(
            self.cache_bytes * (len(item.prompt_token_ids) + step) for item in items for step in range(item.num_output)
        )
        return 2 * self.parameters * tokens / self.rate + (steps * self.weight_bytes + read) / self.copy

    def memory(self) -> float | None:
        """Share of the device's memory that is taken."""
        if self.device != "cuda":
            return None
        free, total = torch.cuda.mem_get_info()
        return 1 - free / total


def measure(model: Model, parts: list[str]) -> Iterator[tuple[str, Any]]:
    """Each part, after a run that compiles what it needs."""
    scale, vocabulary = model.scale, model.vocabulary
    if "decode" in parts:
        for count in (1, 32, 256):
            count = max(1, count // scale)
            given, asked = max(1, 512 // scale), max(2, 256 // scale)
            items = [Item(prompt(count + index, given, vocabulary), asked) for index in range(count)]
            model.run([Item(item.prompt_token_ids, 2) for item in items])
            seconds, _ = model.run([Item(item.prompt_token_ids[::-1], item.num_output) for item in items])
            rate = sum(item.num_output for item in items) / seconds
            yield f"decode_{count}", {"output_tokens_per_s": rate, "floor_fraction": model.floor(items) / seconds}
    if "ttft" in parts:
        for count in (128, 2048, 8192):
            count = max(1, count // scale)
            model.first_token(count, 50 + count)
            found = [model.first_token(count, 90 + count + index) for index in range(3)]
            yield f"ttft_{count}_ms", 1e3 * statistics.median(found)
    if "mixed" in parts:
        items = mixed_items(max(2, 256 // scale), scale, vocabulary)
        model.run(mixed_items(max(2, 64 // scale), scale, vocabulary))
        seconds, first = model.run(items)
        tokens = sum(len(item.prompt_token_ids) + item.num_output for item in items)
        yield "mixed", {
            "tokens_per_s": tokens / seconds, "output_tokens_per_s": sum(i.num_output for i in items) / seconds,
            "ttft_median_s": first, "memory_in_use": model.memory(), "floor_fraction": model.floor(items) / seconds,
        }  # fmt: skip


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--quantization", default=None)
    parser.add_argument("--variant", action="store_true")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=int, default=1)
    arguments = parser.parse_args()
    model = Model(arguments)
    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    model.llm.generate([{"prompt_token_ids": prompt(1, 8, model.vocabulary)}], params, use_tqdm=False)
    found: dict[str, Any] = {
        "engine": f"quire {arguments.quantization or 'bfloat16'}{' (variant)' if arguments.variant else ''}",
        "start_s": process_age_s(), "copy_gb_per_s": model.copy / 1e9, "tflop_per_s": model.rate / 1e12,
        "floor_step_ms": 1e3 * model.weight_bytes / model.copy,
        "budget": next(item.reason for item in model.llm.decisions if item.name == "memory"),
    }  # fmt: skip
    found |= dict(measure(model, arguments.parts))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
