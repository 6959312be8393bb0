"""`quire bench`: throughput of the workloads here, the others in files of their own."""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.bench import profile
from quire.cli import (
    banner,
    bench_core,
    bench_offline,
    bench_serve,
    bench_startup,
    bench_structured,
    engines,
    model_path,
)
from quire.cli.arguments import Parser, add_engine, engine_values
from quire.config import EngineArgs
from quire.errors import ConfigurationError

if TYPE_CHECKING:
    from quire.bench.offline import Measurement
    from quire.bench.peers import EngineProcess
    from quire.bench.workloads import Item
    from quire.llm import LLM

EXAMPLES = """examples:
  quire bench throughput --model DIR --workload W1 W2 --reps 3
  quire bench throughput --model DIR --workload W2 --compare transformers --output-json result.json
  quire bench throughput --model DIR --workload W4 --profile
  quire bench throughput --model DIR --dataset-name random --input-len 256 --output-len 64 --num-prompts 50
  quire bench latency --model DIR --input-len 32 --output-len 128 --batch-size 8
  quire bench startup --model DIR
  quire bench core --rows 16 256 1024
  quire bench serve --num-prompts 100 --request-rate 4
  quire bench compare a.json b.json
  quire bench structured --model DIR --schemas FOLDER --vocabularies DIR1 DIR2 --rows 1 8 32

workloads:
  W1  one stream, 128 tokens in, 128 out
  W2  32 requests at once, 32 to 512 in, 16 to 256 out
  W3  16 requests with a common prefix of 1,024 tokens, 32 own, 32 out
  W4  one prompt of 4,096 tokens, 1 out"""
OURS = "quire"
PEER_S = 3600.0
"""Past it the other engine has failed."""


def add(parser: argparse.ArgumentParser) -> None:
    """The benchmarks."""
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, parser_class=Parser)
    throughput = kinds.add_parser(
        "throughput",
        help="offline workloads through the whole engine",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    throughput.add_argument("--workload", nargs="+", choices=("W1", "W2", "W3", "W4"), help="(default: W1 W2)")
    throughput.add_argument("--reps", type=int, default=3, metavar="N", help="runs of each workload (default: 3)")
    throughput.add_argument(
        "--compare",
        choices=("transformers",),
        help="also run its generate (static batches of 8, bf16, sdpa), taking turns",
    )
    throughput.add_argument(
        "--profile", action="store_true", help="also show what each operation took, by number of rows (CPU)"
    )
    throughput.add_argument("--output-json", metavar="FILE", type=Path, help="write every run there")
    bench_offline.add_dataset(throughput)
    engines.add_quiet(throughput)
    add_engine(throughput)
    bench_offline.add_latency(kinds)
    bench_startup.add(kinds)
    core = kinds.add_parser(
        "core", help="scheduler, runner and sampler: microseconds a step, without a model", allow_abbrev=False
    )
    core.add_argument(
        "--rows", nargs="+", type=int, default=[1, 16, 64, 256, 1024], metavar="N", help="running requests"
    )
    core.add_argument("--steps", type=int, default=100, metavar="N", help="steps timed (default: 100)")
    bench_structured.add(kinds)
    bench_serve.add(kinds)


def run(options: argparse.Namespace) -> int:
    """The benchmark that was named."""
    runs = {
        "core": bench_core.run,
        "structured": bench_structured.run,
        "latency": bench_offline.run_latency,
        "startup": bench_startup.run,
        "throughput": _throughput if getattr(options, "dataset_name", None) is None else bench_offline.run_dataset,
        "serve": bench_serve.run,
        "compare": bench_serve.run_compare,
    }
    return runs[options.kind](options)


def _throughput(options: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from quire.bench import machine, report
    from quire.llm import LLM

    if any(getattr(options, name) is not None for name in ("input_len", "output_len")):
        raise ConfigurationError("input_len and output_len go with --dataset-name", field="dataset_name")
    if options.reps < 1:
        raise ConfigurationError("reps must be at least 1", field="reps")
    args = EngineArgs.from_mapping(engine_values(options))
    model_path.check(args.model)
    if options.profile and args.core_process:
        raise ConfigurationError("a profile is of this process; core_process computes in another", field="profile")
    facts = machine.describe()
    with ExitStack() as stack:
        peer = _peer(args, stack) if options.compare else None
        if peer is not None:
            facts |= peer.facts.versions
        llm = stack.enter_context(LLM(**engine_values(options)))
        banner.show(engines.model_name(args), llm.decisions, quiet=options.quiet)
        facts |= {"model": engines.model_name(args), "threads": str(_threads(args)), "dtype": args.dtype}
        runs = _runs(llm, peer, options)
    if not runs:
        raise ConfigurationError("no workload fits this model", field="workload")
    print(report.as_text(runs, facts, OURS))
    if options.output_json:
        text = json.dumps(report.as_json(runs, facts, OURS), indent=1)
        options.output_json.write_text(text + "\n", encoding="utf-8")
    return 0


def _peer(args: EngineArgs, stack: Any) -> "EngineProcess":
    """Plain transformers in a process of its own: same model, bf16, as many threads; idle while Quire is timed."""
    from quire.bench.peer_answers import PeerError
    from quire.bench.peers import DRIVERS, EngineProcess, Spec
    from quire.compose.served import find_model

    settings = {
        "model": str(find_model(args)),
        "dtype": "bfloat16",
        "device": "cpu",
        "threads": _threads(args),
        "batch_size": 8,
        "mode": "static",
    }
    try:
        driver = str(DRIVERS / "transformers_driver.py")
        peer: EngineProcess = stack.enter_context(EngineProcess(Spec("transformers", driver, sys.executable, settings)))
        peer.start(PEER_S)
    except PeerError as error:
        text = f"transformers cannot be compared with: {error} (pip install 'quire[test]')"
        raise ConfigurationError(text, field="compare") from error
    return peer


def _threads(args: EngineArgs) -> int:
    from quire.ops.select import available_cores

    return args.threads if args.threads is not None else available_cores()[0]


def _runs(llm: "LLM", peer: "EngineProcess | None", options: argparse.Namespace) -> "list[Measurement]":
    """All repetitions of all workloads that fit; within each the engines take turns, first one, then the other."""
    from quire.bench.offline import Measurement, run_quire
    from quire.bench.turns import take_turns
    from quire.bench.workloads import WORKLOADS, warm_up

    vocab_size = llm.vocab_size
    engines_by_name: dict[str, Any] = {OURS: lambda items: run_quire(llm, items)}
    if peer is not None:
        engines_by_name["transformers"] = lambda items: _timed(peer, items)
    for run_one in engines_by_name.values():
        run_one(warm_up(vocab_size))
    runs: list[Measurement] = []

    def show(run: Measurement) -> None:
        if not options.quiet:
            print(f"  {run.workload} {run.engine} {run.output_tokens_per_second:.1f} tok/s", file=sys.stderr)

    for workload in options.workload or ("W1", "W2"):
        if not _fits(workload, WORKLOADS[workload](0, vocab_size), llm.max_model_len):
            continue
        before = _operation_times() if options.profile else []
        begun = len(runs)
        runs += take_turns(engines_by_name, workload, options.reps, vocab_size, show)
        if options.profile:
            elapsed_s = sum(run.elapsed_time for run in runs[begun:] if run.engine == OURS)
            times = profile.between(before, _operation_times())
            print(f"{workload}, {options.reps} runs\n{profile.as_text(times, elapsed_s)}\n")
    return runs


def _timed(peer: "EngineProcess", items: "list[Item]") -> tuple[float, float | None]:
    """As `quire.bench.offline.run_quire`."""
    ran = peer.run(items, PEER_S)
    return ran.elapsed_s, statistics.median(ran.ttfts_s)


def _operation_times() -> "list[profile.OperationTime]":
    from quire.ops.cpu import operation_counts

    return profile.operation_times(operation_counts())


def _fits(workload: str, items: "list[Item]", max_model_len: int) -> bool:
    from quire.bench.workloads import longest

    if longest(items) <= max_model_len:
        return True
    print(
        f"quire: {workload} is left out: it needs {longest(items)} tokens, and max_model_len is {max_model_len}",
        file=sys.stderr,
    )
    return False
