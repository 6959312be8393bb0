"""`quire compare`: throughput, time to first token and memory of Quire beside other engines, in turns in one run."""

import argparse
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli import model_path
from quire.cli.arguments import EMBEDDED_NAME, model_argument
from quire.config import DTYPES, EngineArgs, bytes_of
from quire.errors import ConfigurationError, QuireError

if TYPE_CHECKING:
    from quire.bench.engine_report import Subject
    from quire.bench.engine_turns import Comparison
    from quire.bench.workloads import Item
    from quire.cli.compare_engines import Given
    from quire.plan.estimate import ModelCost

EXAMPLES = """examples:
  quire compare DIR
  quire compare DIR --engines quire transformers --workload W2 --num-prompts 8 --reps 5
  quire compare DIR --python vllm=/opt/vllm/bin/python --python llama.cpp=/opt/llama.cpp/llama-server \\
      --files llama.cpp=model-bf16.gguf --env vllm:LD_PRELOAD=/usr/lib/libtcmalloc_minimal.so.4
  quire compare DIR --url other=http://127.0.0.1:9000 --json --svg table.svg

Each engine runs in a process of its own, under its own interpreter where one is named; while one is timed, the others
are stopped. One that is not installed, or fails, is listed with its reason. --python names llama.cpp's llama-server.
The workloads are those of `quire bench throughput`: all requests come at once, every output has its whole length.
Two results of `quire bench serve` are compared by `quire bench compare`."""
TEXTS = {
    "W1": "128 tokens in, 128 out",
    "W2": "32 to 512 tokens in, 16 to 256 out",
    "W3": "a common prefix of 1,024 tokens, 32 own, 32 out",
    "W4": "4,096 tokens in, 1 out",
}
FAIRNESS = (
    ("weights", "{model}, {dtype}; the same files but where an engine names others"),
    ("device", "{device}, {threads} threads each, {where}; while one engine runs, the others are stopped"),
    ("KV cache", "{kv_mib:,.0f} MiB asked of each, at {kv_bytes_per_token:,} bytes a token; what it has: its own line"),
    ("peak", "of an engine's processes during its turns; over weights: interpreter, libraries, KV cache, activations"),
    (
        "requests",
        "the same token ids in the same order, all at once; other ids in each repetition, so no cache is warm",
    ),
    ("outputs", "greedy, end of sequence ignored; every output had exactly the length that was asked for"),
    (
        "turns",
        "{reps} each: one after the other in a repetition, in every second one the other way round; before the first, "
        "each workload once under other token ids",
    ),
    ("TTFT", "from the moment when all requests came to a request's first token"),
)
"""The checklist: point, and how it is kept."""
WARM_UP = 100_000
"""A repetition that no turn has: its token ids are of the warm-up alone."""
MOST = {"reps": 1000, "num_prompts": 32, "batch_size": 1024, "max_num_seqs": 4096, "threads": 1024}


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    from quire.cli.compare_engines import KNOWN

    flag = parser.add_argument
    flag("model", nargs="?", metavar="MODEL", help=f"a directory, a GGUF file, a hub id; left out: {EMBEDDED_NAME}")
    flag(
        "--engines",
        nargs="+",
        metavar="NAME",
        choices=[*KNOWN],
        help=f"(default: all but quire-server) {', '.join(KNOWN)}",
    )
    flag("--workload", nargs="+", choices=[*TEXTS], default=["W1", "W2"], help="(default: W1 W2)")
    flag("--reps", type=int, default=3, metavar="N", help="turns of each engine (default: 3)")
    flag("--num-prompts", type=int, metavar="N", help="the first N requests of a workload alone")
    flag("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of an engine; may be repeated")
    flag("--files", action="append", default=[], metavar="NAME=PATH", help="the same weights as an engine reads them")
    flag("--url", action="append", default=[], metavar="NAME=URL", help="a server that runs already, of OpenAI's kind")
    flag("--driver", action="append", default=[], metavar="NAME=FILE", help="another engine, by a driver of your own")
    flag("--env", action="append", default=[], metavar="NAME:VARIABLE=VALUE", help="environment of an engine")
    flag("--dtype", default="auto", choices=DTYPES, help="of weights and cache (default: the model's own)")
    flag("--device", default="cpu", choices=("cpu", "cuda"), help="(default: cpu)")
    flag("--threads", type=int, metavar="N", help="of each engine (default: the physical cores)")
    flag("--kv-cache-memory-bytes", default="2GiB", metavar="N", help="KV cache of each engine (default: 2GiB)")
    flag("--max-num-seqs", type=int, default=64, metavar="N", help="sequences at once (default: 64)")
    flag("--batch-size", type=int, default=8, metavar="N", help="of transformers' static batches (default: 8)")
    flag("--start-timeout", type=float, default=900.0, metavar="S", help="for an engine to be ready (default: 900)")
    flag("--run-timeout", type=float, default=1800.0, metavar="S", help="for one turn (default: 1800)")
    flag("--json", action="store_true", help="one JSON object, with every run")
    flag("--svg", type=Path, metavar="FILE", help="draw the table there too")
    flag("--quiet", action="store_true", help="no word of what is being done")
    flag("--revision", metavar="NAME", help="branch, tag or commit on the hub")


def run(options: argparse.Namespace) -> int:
    """Start, take turns, print; 1 where Quire itself could not run."""
    from quire.bench import engine_report
    from quire.bench.engine_turns import Comparison

    _check(options)
    given, names = _given(options)
    name = model_argument(options.model) if options.model is not None else None
    model_path.check(name)
    load = os.getloadavg()[0]
    cost, settings, workloads = _prepared(options, name)
    total = len(workloads) * options.reps * len(names)
    with (
        _ended_by_signals(),
        _progress(total, quiet=options.quiet) as say,
        Comparison(say, options.start_timeout, options.run_timeout) as comparison,
    ):
        _compare(comparison, names, settings, given, workloads, options.reps)
    subject = _subject(options, cost, settings, workloads, load)
    turns, started = comparison.turns, comparison.started
    if not turns:
        raise QuireError("no engine ran: " + "; ".join(f"{one.name}: {one.reason}" for one in started))
    if options.svg is not None:
        options.svg.write_text(engine_report.as_svg(subject, turns, started), encoding="utf-8")
    if options.json:
        print(json.dumps(engine_report.as_json(subject, turns, started), ensure_ascii=False))
    else:
        print(engine_report.as_text(subject, turns, started))
    return int(any(one.name == engine_report.OURS and one.state != "ran" for one in started))


def _check(options: argparse.Namespace) -> None:
    for name, most in MOST.items():
        value = getattr(options, name)
        if value is not None and not 1 <= value <= most:
            raise ConfigurationError(f"{name} must be between 1 and {most}, got {value}", field=name)
    for name in ("start_timeout", "run_timeout"):
        if not 0 < getattr(options, name) <= 86400:
            raise ConfigurationError(f"{name} must be above 0 and at most 86400 seconds", field=name)
    if options.svg is not None and not options.svg.parent.is_dir():
        raise ConfigurationError(f"svg: there is no folder {options.svg.parent}", field="svg")


def _given(options: argparse.Namespace) -> "tuple[Given, list[str]]":
    """What was said of single engines, and which engines take part."""
    from quire.cli.compare_engines import DEFAULT, KNOWN, Given, pairs

    url, driver = (pairs(getattr(options, flag), flag, None) for flag in ("url", "driver"))
    if taken := sorted((url.keys() | driver.keys()) & KNOWN.keys() | url.keys() & driver.keys()):
        raise ConfigurationError(f"url and driver: {taken[0]} is taken; give another name", field="url")
    known = [*KNOWN, *driver]
    names = list(dict.fromkeys([*(options.engines or DEFAULT), *url, *driver]))
    environment: dict[str, dict[str, str]] = {}
    for item in options.env:
        engine, colon, rest = item.partition(":")
        if not colon or engine not in names:
            raise ConfigurationError(f"env must be NAME:VARIABLE=VALUE, got {item[:80]!r}", field="env")
        environment.setdefault(engine, {}).update(pairs([rest], "env", None))
    python = {name: shutil.which(path) or path for name, path in pairs(options.python, "python", known).items()}
    if "llama.cpp" in names and (server := shutil.which("llama-server")):
        python.setdefault("llama.cpp", server)
    return Given(python, pairs(options.files, "files", known), url, driver, environment), names


def _prepared(
    options: argparse.Namespace, name: str | None
) -> "tuple[ModelCost, dict[str, Any], dict[str, list[list[Item]]]]":
    """What the model costs, the settings that all share, and each workload's requests: repetitions, then warm-up."""
    from quire.bench.workloads import WORKLOADS, longest
    from quire.cli.compare_engines import processors, shape
    from quire.cli.plan import cost_of
    from quire.compose.served import find_model
    from quire.ops.select import available_cores, core_processors

    asked = argparse.Namespace(
        revision=options.revision, dtype=options.dtype, quantization=None, quantization_group_size=None,
        kv_cache_dtype="auto", device=None,
    )  # fmt: skip
    cost = cost_of(asked, name, None)
    workloads = {}
    for workload in dict.fromkeys(options.workload):
        seeds = [*range(options.reps), WARM_UP]
        items = [WORKLOADS[workload](seed, cost.spec.vocab_size)[: options.num_prompts] for seed in seeds]
        if longest(items[0]) <= cost.spec.max_position_embeddings:
            workloads[workload] = items
        else:
            text = f"quire: {workload} is left out: it needs {longest(items[0])} tokens, more than the model has"
            print(text, file=sys.stderr)
    if not workloads:
        raise ConfigurationError("no workload fits this model", field="workload")
    tokens, most_requests = shape({workload: items[0] for workload, items in workloads.items()})
    threads = options.threads or available_cores()[0]
    settings = {
        "model": str(find_model(EngineArgs(model=name, revision=options.revision))),
        "dtype": cost.packer.dtype,
        "device": options.device,
        "threads": threads,
        "processors": processors(threads, core_processors()) if options.device == "cpu" else [],
        "max_model_len": min(tokens, cost.spec.max_position_embeddings),
        "max_num_seqs": options.max_num_seqs,
        "most_requests": most_requests,
        "kv_bytes": bytes_of("kv_cache_memory_bytes", options.kv_cache_memory_bytes),
        "kv_bytes_per_token": cost.kv_bytes_per_token,
        "batch_size": options.batch_size,
        "start_timeout_s": options.start_timeout,
    }
    return cost, settings, workloads


def _compare(
    comparison: "Comparison",
    names: Sequence[str],
    settings: dict[str, Any],
    given: "Given",
    workloads: "dict[str, list[list[Item]]]",
    reps: int,
) -> None:
    from quire.cli.compare_engines import spec, unfit

    warm_ups = [items[-1] for items in workloads.values()]
    for name in names:
        if why := unfit(name, settings, given):
            comparison.leave_out(name, why)
        else:
            comparison.start(spec(name, settings, given), warm_ups)
    for workload, repetitions in workloads.items():
        for rep in range(reps):
            comparison.run(workload, rep, repetitions[rep])


def _subject(
    options: argparse.Namespace,
    cost: "ModelCost",
    settings: dict[str, Any],
    workloads: "dict[str, list[list[Item]]]",
    load: float,
) -> "Subject":
    from quire.bench import machine
    from quire.bench.engine_report import Subject

    texts = {name: f"{_count(len(items[0]))}: {TEXTS[name]}" for name, items in workloads.items()}
    files, dtype = Path(settings["model"]), str(settings["dtype"])
    if files.is_file() or (files / "engine.json").is_file():
        dtype = f"formats as they are stored, else {dtype}"
    bound = ", ".join(map(str, settings["processors"]))
    where = f"what is started here on processors {bound}" if bound else "on the processors that the system gives"
    values = {**settings, "dtype": dtype, "where": where, "kv_mib": settings["kv_bytes"] / 2**20, "reps": options.reps}
    fairness = [(point, text.format(**values)) for point, text in FAIRNESS]
    facts = {**machine.describe(), "load": f"{load:.1f} runnable before, {os.getloadavg()[0]:.1f} after"}
    model = options.model or EMBEDDED_NAME
    return Subject(Path(model).name, dtype, cost.weight_bytes, texts, facts, fairness)


def _count(requests: int) -> str:
    return "1 request" if requests == 1 else f"{requests} requests at once"


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP leave as Ctrl-C does, through every `with`: what the engines have started must not stay."""

    def leave(number: int, frame: object) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)  # a second one must not stop the first one's work
        sys.exit(128 + number)

    ending = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    is_main = threading.current_thread() is threading.main_thread()
    before = {one: signal.getsignal(one) for one in ending if is_main and signal.getsignal(one) != signal.SIG_IGN}
    try:
        for one in before:
            signal.signal(one, leave)
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Told what happens, it shows it: a bar on a terminal, else a line each."""
    if quiet:
        yield lambda text: None
    elif not sys.stderr.isatty():
        yield lambda text: print(f"  {text}", file=sys.stderr, flush=True)
    else:
        from tqdm.auto import tqdm

        with tqdm(total=total, desc="turns", dynamic_ncols=True) as bar:

            def say(text: str) -> None:
                bar.write(f"  {text}", file=sys.stderr)
                bar.update(text.endswith("tok/s"))

            yield say
