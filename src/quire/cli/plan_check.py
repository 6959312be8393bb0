"""`quire plan --check`: run what was planned, and print what was measured beside it."""

import argparse
import gc
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli.plan import BLOCK, CHUNK, NONE, Planned, cost_of, memory_mib
from quire.config import EngineArgs
from quire.errors import ConfigurationError, QuireError

if TYPE_CHECKING:
    from quire.llm import LLM
    from quire.outputs import RequestMetrics, RequestOutput
    from quire.plan.estimate import ModelCost

TOKENS = 32
"""Of each answer: as many steps are timed, half of them before the context is reached."""
RUNS = 2
"""Of each cell; the fastest counts, for other processes make one slower and none faster."""
STARTED = ("quire.compose.core", "quire.compose.served", "quire.compose.text", "quire.text.tokenizer")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def check(options: argparse.Namespace, name: str | None, planned: Planned) -> dict[str, Any]:
    """Every context and batch: prediction, measurement and the median error. Each quantisation runs in a process of its
    own, whose memory nothing has used before.

    Raises:
        ConfigurationError: the model is shorter than a context.
        QuireError: a run was killed, or ended early.
    """
    asked = options.check_quantization or [options.quantization or NONE]
    times: list[dict[str, Any]] = []
    memories: list[dict[str, Any]] = []
    for one in asked:
        quantization = None if one == NONE else one
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            try:
                found, memory = process.submit(_run, options, name, quantization, planned).result()
            except BrokenProcessPool as error:
                text = f"the process that ran {one} was killed: the system does that where memory runs out"
                raise QuireError(text) from error
        times += found
        memories += [memory] if memory else []
    errors = {"median_time_error": _median([line["error"] for line in times])}
    if memories:
        errors["median_memory_error"] = _median([line["error"] for line in memories])
    return {"checked": times, "checked_memory": memories, **errors}


def show(checked: dict[str, Any]) -> None:
    """As a table."""
    head = f"{'weights':>10} {'context':>8} {'batch':>6} {'what':>5}"
    print(f"\n{head} {'predicted, ms':>14} {'measured, ms':>13} {'error':>7}")
    for one in checked["checked"]:
        place = f"{one['quantization']:>10} {one['context']:8,} {one['batch']:6} {one['what']:>5}"
        print(f"{place} {one['predicted_ms']:14.2f} {one['measured_ms']:13.2f} {one['error']:+7.0%}")
    for one in checked["checked_memory"]:
        sizes = f"predicted {one['predicted_mib']:,.0f} MiB, measured {one['measured_mib']:,.0f} MiB"
        print(f"{one['quantization']:>10} memory: {sizes} ({one['error']:+.1%})")
    print(f"median error of time {checked['median_time_error']:.0%}", end="")
    memory = checked.get("median_memory_error")
    print("" if memory is None else f", of memory {memory:.1%}")


def _run(
    options: argparse.Namespace, name: str | None, quantization: str | None, planned: Planned
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    from quire.llm import LLM

    cost = cost_of(options, name, quantization)
    args = {name: getattr(options, name) for name in ("dtype", "kv_cache_dtype", "revision")}
    args["quantization"] = quantization
    if quantization == options.quantization:
        args["quantization_group_size"] = options.quantization_group_size
    longest = max(options.context) + TOKENS
    limit = cost.spec.max_position_embeddings
    least = TOKENS // 2 + 1
    if longest > limit or min(options.context) < least:
        text = f"context must be from {least} to {limit - TOKENS} to be checked"
        raise ConfigurationError(text, field="context")
    for module in STARTED:  # what a start imports is no part of what the model takes
        import_module(module)
    _read_tokenizer(name, options)
    gc.collect()
    before = _memory_mib("VmRSS")
    with suppress(OSError):
        CLEAR.write_text("5")  # the peak begins here
    sizes = {"max_num_seqs": max(options.batch), "max_model_len": longest, "block_size": BLOCK}
    with LLM(model=name, enable_prefix_caching=False, **sizes, **args) as llm:
        found = [
            {"quantization": quantization or NONE, **line}
            for context in options.context
            for batch in options.batch
            for line in _cell(llm, cost, planned, batch, context)
        ]
        peak = _memory_mib("VmHWM")
    if before is None or peak is None:
        return found, None
    predicted, measured = memory_mib(cost, max(options.batch), longest), peak - before
    error = predicted / measured - 1
    memory = {"predicted_mib": predicted, "measured_mib": measured, "error": error}
    return found, {"quantization": quantization or NONE, **memory}


def _read_tokenizer(name: str | None, options: argparse.Namespace) -> None:
    """Its memory is not counted: the model's own copy lies where this one was."""
    from quire.compose.served import find_model
    from quire.compose.text import compose_text

    args = EngineArgs(model=name, revision=options.revision)
    compose_text(args, find_model(args))


def _cell(llm: "LLM", cost: "ModelCost", planned: Planned, batch: int, context: int) -> Iterator[dict[str, Any]]:
    """TPOT of sequences that grow past the context; and TTFT, where there is one."""
    runs = [_timed(llm, batch, context) for _ in range(RUNS)]
    measured = {"TPOT": (min(one[0] for one in runs), planned.decode_s(cost, batch, context))}
    if batch == 1:
        measured["TTFT"] = min(one[1] for one in runs), planned.prefill_s(cost, context - TOKENS // 2)
    for what, (measured_s, predicted_s) in measured.items():
        yield {
            "context": context,
            "batch": batch,
            "what": what,
            "predicted_ms": predicted_s * 1e3,
            "measured_ms": measured_s * 1e3,
            "error": predicted_s / measured_s - 1,
        }


def _timed(llm: "LLM", batch: int, context: int) -> tuple[float, float]:
    """Seconds of a token of every sequence, and of the first one's first."""
    from quire.sampling_params import SamplingParams

    length = context - TOKENS // 2
    prompts = [
        {"prompt_token_ids": [1 + (number * 7 + row) % (llm.vocab_size - 1) for number in range(length)]}
        for row in range(batch)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    short = next((one.outputs[0] for one in outputs if len(one.outputs[0].token_ids) < TOKENS), None)
    if short is not None:
        text = f"a request of {context} tokens ended after {len(short.token_ids)} of {TOKENS}"
        raise QuireError(f"{text}: {short.stop_reason or short.finish_reason}")
    found = [_metrics(one) for one in outputs]
    # The last to begin decodes beside all the others, until the first of them ends.
    begun, ended = max(one.first_token_s or 0.0 for one in found), min(one.last_token_s or 0.0 for one in found)
    steps = TOKENS - 1 - _steps_before(batch, length)
    return (ended - begun) / max(1, steps), found[0].prefill_s or 0.0


def _steps_before(batch: int, length: int) -> int:
    """Tokens that the first sequence has when the last one gets its first: prompts come in chunks of so many tokens."""
    first, last = -(-length // CHUNK), -(-batch * length // CHUNK)
    return last - first


def _memory_mib(name: str) -> float | None:
    with suppress(OSError, StopIteration):
        lines = STATUS.read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024
    return None


def _metrics(output: "RequestOutput") -> "RequestMetrics":
    assert output.metrics is not None
    return output.metrics


def _median(errors: list[float]) -> float:
    return statistics.median(map(abs, errors))
