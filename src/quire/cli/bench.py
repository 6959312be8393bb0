"""`quire bench`: throughput and core here, kernels in its own file."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli import banner, bench_kernels, engines
from quire.cli.arguments import Parser, add_engine, engine_values
from quire.config import EngineArgs
from quire.errors import ConfigurationError

if TYPE_CHECKING:
    from quire.bench.offline import Measurement, TransformersPeer
    from quire.bench.workloads import Item
    from quire.llm import LLM

EXAMPLES = """examples:
  quire bench throughput --model DIR --workload W1 W2 --reps 3
  quire bench throughput --model DIR --workload W2 --compare transformers --output-json result.json
  quire bench core --rows 16 256 1024

workloads:
  W1  one stream, 128 tokens in, 128 out
  W2  32 requests at once, 32 to 512 in, 16 to 256 out
  W3  16 requests with a common prefix of 1,024 tokens, 32 own, 32 out
  W4  one prompt of 4,096 tokens, 1 out"""
OURS = "quire"
CORE_BLOCK_SIZE = 16
PROMPT_TOKENS = 64


def add(parser: argparse.ArgumentParser) -> None:
    """The three benchmarks."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, parser_class=Parser)
    throughput = kinds.add_parser(
        "throughput",
        help="offline workloads through the whole engine",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    throughput.add_argument("--workload", nargs="+", choices=("W1", "W2", "W3", "W4"), default=["W1", "W2"])
    throughput.add_argument("--reps", type=int, default=3, metavar="N", help="runs of each workload (default: 3)")
    throughput.add_argument(
        "--compare",
        choices=("transformers",),
        help="also run its generate (static batches of 8, bf16, sdpa), taking turns",
    )
    throughput.add_argument("--output-json", metavar="FILE", help="write every run there")
    engines.add_quiet(throughput)
    add_engine(throughput)
    bench_kernels.add(kinds)
    core = kinds.add_parser(
        "core", help="the scheduler alone: microseconds a step, without a model", allow_abbrev=False
    )
    core.add_argument("--rows", nargs="+", type=int, default=[16, 256, 1024], metavar="N", help="running requests")
    core.add_argument("--steps", type=int, default=100, metavar="N", help="steps timed (default: 100)")


def run(options: argparse.Namespace) -> int:
    """The one that was asked for."""
    runs = {"core": _core, "kernels": bench_kernels.run, "throughput": _throughput}
    return runs[options.kind](options)


def _throughput(options: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from quire.bench import machine, report
    from quire.llm import LLM

    if options.reps < 1:
        raise ConfigurationError("reps must be at least 1", field="reps")
    args = EngineArgs.from_mapping(engine_values(options))
    facts = machine.describe()
    with ExitStack() as stack:
        peer = _peer(args, stack) if options.compare else None
        if peer is not None:
            facts |= peer.versions
        llm = stack.enter_context(LLM(**engine_values(options)))
        banner.show(engines.model_name(args), llm.decisions, quiet=options.quiet)
        facts |= {"model": engines.model_name(args), "threads": str(_threads(args)), "dtype": args.dtype}
        runs = _runs(llm, peer, options)
    if not runs:
        raise ConfigurationError("no workload fits this model", field="workload")
    print(report.as_text(runs, facts, OURS))
    if options.output_json:
        text = json.dumps(report.as_json(runs, facts, OURS), indent=1)
        Path(options.output_json).write_text(text + "\n", encoding="utf-8")
    return 0


def _peer(args: EngineArgs, stack: Any) -> "TransformersPeer":
    from importlib.util import find_spec

    from quire.bench.offline import TransformersPeer
    from quire.demo import model_path

    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"--compare transformers needs {' and '.join(missing)}, which is not installed: pip install 'quire[test]'",
            field="compare",
        )
    peer = TransformersPeer(args.model or model_path(), threads=_threads(args))
    stack.enter_context(peer)
    return peer


def _threads(args: EngineArgs) -> int:
    from quire.ops.select import available_cores

    return args.threads if args.threads is not None else available_cores()[0]


def _runs(llm: "LLM", peer: "TransformersPeer | None", options: argparse.Namespace) -> "list[Measurement]":
    """All repetitions of all workloads that fit; within each the engines take turns, first one, then the other."""
    from quire.bench.offline import measure, run_quire
    from quire.bench.workloads import WORKLOADS, warm_up

    vocab_size = llm.vocab_size
    engines_by_name: dict[str, Any] = {OURS: lambda items: run_quire(llm, items)}
    if peer is not None:
        engines_by_name["transformers"] = peer.run
    for run_one in engines_by_name.values():
        run_one(warm_up(vocab_size))
    runs: list[Measurement] = []
    for workload in options.workload:
        if not _fits(workload, WORKLOADS[workload](0, vocab_size), llm.max_model_len):
            continue
        for repetition in range(options.reps):
            items = WORKLOADS[workload](repetition, vocab_size)
            order = list(engines_by_name) if repetition % 2 == 0 else list(reversed(engines_by_name))
            for name in order:
                runs.append(measure(name, workload, repetition, items, *engines_by_name[name](items)))
                if not options.quiet:
                    last = runs[-1]
                    print(f"  {workload} {name} {last.output_tokens_per_second:.1f} tok/s", file=sys.stderr)
    return runs


def _fits(workload: str, items: "list[Item]", max_model_len: int) -> bool:
    from quire.bench.workloads import longest

    if longest(items) <= max_model_len:
        return True
    print(
        f"quire: {workload} is left out: it needs {longest(items)} tokens, and max_model_len is {max_model_len}",
        file=sys.stderr,
    )
    return False


def _core(options: argparse.Namespace) -> int:
    from quire.bench.core_clock import time_core

    if min(options.rows) < 1 or options.steps < 1:
        raise ConfigurationError("rows and steps must be at least 1", field="rows")
    print(f"{'rows':>6} {'schedule us':>12} {'update us':>10} {'core us/step':>13} {'us/row':>7}")
    for num_rows in options.rows:
        times = time_core(lambda rows: _core_and_fake(rows, options.steps), num_rows, num_steps=options.steps)
        print(
            f"{num_rows:>6} {times.schedule_us:>12.1f} {times.update_us:>10.1f} "
            f"{times.core_us:>13.1f} {times.core_us / num_rows:>7.2f}"
        )
    return 0


def _core_and_fake(num_rows: int, num_steps: int) -> Any:
    """A scheduler with `num_rows` requests that all fit, and an executor without a model."""
    from quire.core.policy import make_policy
    from quire.core.prefix_cache import PrefixCache
    from quire.core.request import NewRequest, SamplingSpec
    from quire.core.scheduler import Scheduler, SchedulerLimits
    from quire.executor.fake import FakeExecutor

    length = PROMPT_TOKENS + num_steps + 8
    num_blocks = num_rows * (length // CORE_BLOCK_SIZE + 1)
    limits = SchedulerLimits(
        max_num_seqs=num_rows,
        max_num_batched_tokens=num_rows * PROMPT_TOKENS,  # all prompts in the first step
        max_model_len=length,
        block_size=CORE_BLOCK_SIZE,
        num_blocks=num_blocks,
    )
    scheduler = Scheduler(limits, make_policy("fcfs"), PrefixCache(bytes(32)))
    for number in range(num_rows):
        prompt = tuple((number * 31 + place) % 1000 for place in range(PROMPT_TOKENS))
        scheduler.add(NewRequest(str(number), prompt, num_steps + 8, SamplingSpec(seed=number)))
    executor = FakeExecutor(num_blocks=num_blocks, block_size=CORE_BLOCK_SIZE, max_num_seqs=num_rows, vocab_size=1000)
    return scheduler, executor
