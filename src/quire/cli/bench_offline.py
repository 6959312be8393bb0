"""`quire bench latency`, and `quire bench throughput --dataset-name`: flags and results of `vllm bench`'s."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli import banner, engines, model_path
from quire.cli.arguments import add_engine, engine_values
from quire.cli.bench_dataset import LENGTHS, NUM_PROMPTS, RANDOM, RANDOM_LENGTHS, named, sharegpt_loads
from quire.config import EngineArgs
from quire.errors import ConfigurationError
from quire.outputs import RequestOutput
from quire.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from quire.bench.serving import Load
    from quire.llm import LLM

PERCENTS = (10, 25, 50, 75, 90, 99)
MOST = 2**20
EXAMPLES = """examples:
  quire bench latency --model DIR --input-len 32 --output-len 128 --batch-size 8
  quire bench latency --num-iters-warmup 2 --num-iters 10 --output-json latency.json

The flags and the names of the figures are those of `vllm bench latency`: seconds of a batch from its start to its end,
random prompts, temperature 1, no prefix cache unless --enable-prefix-caching."""
Generate = Callable[[], "list[RequestOutput]"]


def add_latency(kinds: Any) -> None:
    """Flags of `bench latency`."""
    parser = kinds.add_parser(
        "latency",
        help="seconds that one batch takes",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--input-len", type=int, default=32, metavar="N", help="tokens of a prompt (default: 32)")
    flag("--output-len", type=int, default=128, metavar="N", help="tokens of an answer (default: 128)")
    flag("--batch-size", type=int, default=8, metavar="N", help="prompts (default: 8)")
    flag("--n", type=int, default=1, metavar="N", help="answers of each, or beams (default: 1)")
    flag("--use-beam-search", action="store_true", help="beam search instead of sampling")
    flag("--num-iters-warmup", type=int, default=10, metavar="N", help="batches that are not counted (default: 10)")
    flag("--num-iters", type=int, default=30, metavar="N", help="batches that are (default: 30)")
    flag("--disable-detokenize", action="store_true", help="token ids out, no text")
    flag("--seed-prompts", type=int, default=0, metavar="N", help="of the random prompts (default: 0)")
    flag("--output-json", type=Path, metavar="FILE", help="write the figures there")
    engines.add_quiet(parser)
    add_engine(parser)


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench throughput` that are vLLM's."""
    group = parser.add_argument_group("requests as in `vllm bench throughput`, instead of --workload")
    flag = group.add_argument
    text = "sharegpt-lengths: random tokens, lengths like those of ShareGPT"
    flag("--dataset-name", type=named, choices=(RANDOM, LENGTHS), help=text)
    flag("--num-prompts", type=int, default=NUM_PROMPTS, metavar="N", help="requests (default: 1000)")
    flag("--input-len", "--random-input-len", type=int, metavar="N", help="tokens of a prompt (random: 1024)")
    flag("--output-len", "--random-output-len", type=int, metavar="N", help="tokens of an answer (random: 128)")
    flag("--random-range-ratio", type=float, default=0.0, metavar="R", help="lengths within this share of these")
    flag("--prefix-len", "--random-prefix-len", type=int, default=0, metavar="N", help="tokens that all begin with")
    flag("--n", type=int, default=1, metavar="N", help="answers of each (default: 1)")
    flag("--disable-detokenize", action="store_true", help="token ids out, no text")


def within(options: argparse.Namespace, least: int, *names: str) -> None:
    """Hold counts to their bounds.

    Raises:
        ConfigurationError: naming the flag.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not least <= value <= MOST:
            raise ConfigurationError(f"{name} must be between {least} and {MOST:,}, got {value}", field=name)


def run_latency(options: argparse.Namespace) -> int:
    """Time batches, print, write."""
    from quire.bench.serving import random_loads
    from quire.llm import LLM

    within(options, 1, "input_len", "output_len", "batch_size", "n", "num_iters")
    within(options, 0, "num_iters_warmup")
    check_folder(options.output_json)
    values = {"enable_prefix_caching": False, **engine_values(options)}
    args = EngineArgs.from_mapping(values)
    model_path.check(args.model)
    with LLM(**values) as llm:
        banner.show(engines.model_name(args), llm.decisions, quiet=options.quiet)
        _check_length(llm, options.input_len + options.output_len)
        loads = random_loads(
            options.batch_size, options.input_len, options.output_len, 0.0, 0, options.seed_prompts, as_text=False
        )
        once = _batch(llm, _prompts(loads, llm.vocab_size), options)
        for _ in counted(options.num_iters_warmup, "warm-up", options):
            once()
        latencies = [_timed(once) for _ in counted(options.num_iters, "batches", options)]
    found = latency_result(latencies)
    print(f"average latency: {found['avg_latency']:.4f} s\nspread (std): {found['std_latency']:.4f} s")
    for percent, value in found["percentiles"].items():
        print(f"{percent}% percentile: {value:.4f} s")
    write(options.output_json, found)
    return 0


def _batch(llm: "LLM", prompts: list[Any], options: argparse.Namespace) -> Generate:
    if options.use_beam_search:
        beams = BeamSearchParams(beam_width=options.n, max_tokens=options.output_len, ignore_eos=True)
        return lambda: llm.beam_search(prompts, beams)
    params = SamplingParams(
        n=options.n,
        temperature=1.0,
        ignore_eos=True,
        max_tokens=options.output_len,
        detokenize=not options.disable_detokenize,
    )
    return lambda: llm.generate(prompts, params, use_tqdm=False)


def _timed(once: Generate) -> float:
    begun = time.perf_counter()
    once()
    return time.perf_counter() - begun


def latency_result(latencies: list[float]) -> dict[str, Any]:
    """The figures under vLLM's names, in seconds."""
    from quire.bench.serving import percentile

    return {
        "avg_latency": statistics.fmean(latencies),
        "std_latency": statistics.pstdev(latencies),
        "latencies": latencies,
        "percentiles": {str(percent): percentile(latencies, percent) for percent in PERCENTS},
    }


def run_dataset(options: argparse.Namespace) -> int:
    """`bench throughput` of a dataset: all requests at once, vLLM's figures."""
    from quire.llm import LLM

    within(options, 1, "num_prompts", "input_len", "output_len", "n")
    within(options, 0, "prefix_len")
    if not 0 <= options.random_range_ratio < 1:
        raise ConfigurationError("random_range_ratio must be in [0, 1)", field="random_range_ratio")
    if options.dataset_name == LENGTHS and (options.input_len is not None or options.prefix_len):
        raise ConfigurationError("input_len and prefix_len go with --dataset-name random", field="input_len")
    if options.compare or options.profile:
        raise ConfigurationError("compare and profile go with --workload", field="dataset_name")
    check_folder(options.output_json)
    args = EngineArgs.from_mapping(engine_values(options))
    model_path.check(args.model)
    with LLM(**engine_values(options)) as llm:
        banner.show(engines.model_name(args), llm.decisions, quiet=options.quiet)
        loads = _loads(options, llm.max_model_len)
        _check_length(llm, max(load.num_prompt + load.num_output for load in loads))
        params = [
            SamplingParams(
                n=options.n,
                temperature=1.0,
                ignore_eos=True,
                max_tokens=load.num_output,
                detokenize=not options.disable_detokenize,
            )
            for load in loads
        ]
        begun = time.perf_counter()
        outputs = llm.generate(_prompts(loads, llm.vocab_size), params, use_tqdm=not options.quiet)
        elapsed_s = time.perf_counter() - begun
    found = throughput_result(outputs, elapsed_s) | {"dataset_name": options.dataset_name}
    num_output = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    print(
        f"Throughput: {found['requests_per_second']:.2f} requests/s, {found['tokens_per_second']:.2f} total tokens/s, "
        f"{num_output / elapsed_s:.2f} output tokens/s"
    )
    print(f"prompt tokens: {found['total_num_tokens'] - num_output}\noutput tokens: {num_output}")
    write(options.output_json, found)
    return 0


def throughput_result(outputs: list[RequestOutput], elapsed_s: float) -> dict[str, Any]:
    """The figures under vLLM's names."""
    tokens = sum(len(one.prompt_token_ids) + sum(len(part.token_ids) for part in one.outputs) for one in outputs)
    return {
        "elapsed_time": elapsed_s,
        "num_requests": len(outputs),
        "total_num_tokens": tokens,
        "requests_per_second": len(outputs) / elapsed_s,
        "tokens_per_second": tokens / elapsed_s,
    }


def _loads(options: argparse.Namespace, max_model_len: int) -> "list[Load]":
    from dataclasses import replace

    from quire.bench.serving import random_loads

    seed = getattr(options, "seed", 0) or 0
    if options.dataset_name == LENGTHS:
        loads = sharegpt_loads(options.num_prompts, min(2048, max_model_len), seed, as_text=False)
        return [replace(load, num_output=options.output_len or load.num_output) for load in loads]
    lengths = options.input_len or RANDOM_LENGTHS[0], options.output_len or RANDOM_LENGTHS[1]
    return random_loads(
        options.num_prompts, *lengths, options.random_range_ratio, options.prefix_len, seed, as_text=False
    )


def _prompts(loads: "list[Load]", vocab_size: int) -> list[Any]:
    """Token ids within the vocabulary."""
    return [{"prompt_token_ids": [int(token) % vocab_size for token in load.prompt]} for load in loads]


def _check_length(llm: "LLM", needed: int) -> None:
    if needed > llm.max_model_len:
        text = f"a request needs {needed} tokens, prompt and answer together, and max_model_len is {llm.max_model_len}"
        raise ConfigurationError(text, field="max_model_len")


def counted(count: int, name: str, options: argparse.Namespace) -> Iterable[int]:
    """So many rounds, with a bar unless --quiet."""
    from tqdm.auto import tqdm

    bar: Iterable[int] = tqdm(range(count), desc=name, dynamic_ncols=True, disable=options.quiet)
    return bar


def check_folder(path: Path | None) -> None:
    """Raise ConfigurationError where there is none for `--output-json`."""
    if path is not None and not path.parent.is_dir():
        raise ConfigurationError(f"output_json: there is no folder {path.parent}", field="output_json")


def write(path: Path | None, found: dict[str, Any]) -> None:
    """The figures as JSON, where `--output-json` names a file."""
    if path is not None:
        path.write_text(json.dumps(found, indent=4) + "\n", encoding="utf-8")
