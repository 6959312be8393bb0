"""`quire eval`: what formats of a model lose, and with `--table` what they take and how fast they are."""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli import model_path
from quire.cli.arguments import EMBEDDED_NAME, ENGINE_HELP, add_engine, model_argument
from quire.cli.eval_formats import AS_IT_IS, format_values
from quire.config import QUANTIZATIONS
from quire.errors import ConfigurationError

if TYPE_CHECKING:
    from quire.bench.eval_report import Table
    from quire.cli.eval_models import Options

EXAMPLES = """examples:
  quire eval DIR --quantization none int8 int4:32 int4
  quire eval DIR MODEL.Q4_K_M.gguf ENGINE --text FILE
  quire eval smollm2 --table
  quire eval DIR --table --workload W1 W2 --reps 5 --json --svg table.svg
  quire eval DIR --quantization none int4 int4,dtype=float16

Each format is held against the first model in float32 (or --reference), on the same tokens: perplexity, KL divergence
of the next token, and how often the most probable token is the same. A MODEL is whatever `quire serve` takes."""
MAX_TOKENS = 2**20
SHARED = tuple(name for name in "dtype kv_cache_dtype tokenizer revision device threads block_size".split())
"""Engine arguments as flags, for all formats; a format may name others."""


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"directory, engine, GGUF file, hub id, smollm2 or {EMBEDDED_NAME}"
    )
    parser.add_argument(
        "--quantization",
        nargs="+",
        metavar="FORMAT",
        help=f"formats: {AS_IT_IS} (as it is), float32, bfloat16, float16, {', '.join(QUANTIZATIONS)}, int4:32 (groups "
        f"of 32); then ,NAME=VALUE (dtype, block_size). Left out: {AS_IT_IS}, with --table all that run here",
    )
    parser.add_argument("--reference", metavar="MODEL", help="what is float32 and right (left out: the first model)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8, up to 16 MiB (left out: the packaged one)")
    parser.add_argument("--tokens", type=_count, default=4096, metavar="N", help="of the text, at most (4096)")
    parser.add_argument("--context", type=_count, metavar="N", help="tokens that are read together (1024)")
    parser.add_argument(
        "--stride", type=_count, metavar="N", help="from one context to the next; left out: they do not overlap"
    )
    parser.add_argument("--table", action="store_true", help="speed and memory too, with the formats in turns")
    parser.add_argument("--workload", nargs="+", choices=("W1", "W2"), default=["W1"], help="timed by --table (W1)")
    parser.add_argument("--reps", type=_count, default=3, metavar="N", help="runs of each format (3)")
    parser.add_argument("--json", action="store_true", help="one JSON object, with every run")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the table there too")
    parser.add_argument("--quiet", action="store_true", help="no word of what is being done")
    add_engine(parser, names=[name for name in SHARED if name in ENGINE_HELP])


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number from 1 to {MAX_TOKENS:,}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Measure, and print the tables."""
    from quire.bench import eval_report, eval_svg, machine

    asked = _asked(options)
    if options.svg is not None and not options.svg.parent.is_dir():
        raise ConfigurationError(f"svg: there is no folder {options.svg.parent}", field="svg")
    load = os.getloadavg()[0]
    tables = _tables(asked)
    facts = {**machine.describe(), "load at the start": f"{load:.1f} runnable", **_computed(asked)}
    if options.svg is not None:
        foot = [*eval_report.how(tables), "; ".join(f"{name}: {value}" for name, value in facts.items())]
        options.svg.write_text(eval_svg.draw(tables, foot), encoding="utf-8")
    if options.json:
        print(json.dumps(eval_report.as_json(tables, facts), ensure_ascii=False))
        return 0
    for table in tables:
        print(eval_report.as_text(table), end="\n\n")
    print("\n".join([*eval_report.how(tables), *(f"{name}: {value}" for name, value in facts.items())]))
    return 0


def _asked(options: argparse.Namespace) -> "Options":
    from quire.cli.eval_models import Options

    models = [model_argument(one) for one in options.models] or [None]
    reference = models[0] if options.reference is None else model_argument(options.reference)
    for one in (*models, reference):
        model_path.check(one)
    shared = {name: getattr(options, name) for name in SHARED if hasattr(options, name)}
    words = options.quantization or [AS_IT_IS, *(_runnable(shared) if options.table else ())]
    formats = {word: {**shared, **format_values(word)} for word in words}
    return Options(
        models=models,
        reference=reference,
        formats=formats,
        text=options.text,
        tokens=options.tokens,
        context=options.context,
        stride=options.stride,
        workloads=options.workload if options.table else [],
        reps=options.reps,
        quiet=options.quiet,
    )


def _runnable(shared: Mapping[str, Any]) -> list[str]:
    """The quantisations that the device has."""
    from quire.ops.select import select_ops
    from quire.quant.select import scheme_for, select_scheme

    ops, _ = select_ops(shared.get("device", "auto"), shared.get("threads"))
    found = []
    for name in QUANTIZATIONS:
        try:
            scheme_for(select_scheme(name, None), ops)
        except ConfigurationError:
            continue
        found.append(name)
    return found


def _computed(asked: "Options") -> dict[str, str]:
    """With what it was computed, and how often."""
    from quire.ops.select import select_ops

    shared = asked.shared
    _, decisions = select_ops(shared.get("device", "auto"), shared.get("threads"))
    found = {one.name: one.value for one in decisions if one.name in ("operations", "instruction_set", "threads")}
    return found | ({"runs": f"{asked.reps} of each workload"} if asked.workloads else {})


def _tables(asked: "Options") -> "list[Table]":
    from quire.cli.eval_models import beside, evaluate

    table, on_grid = evaluate(asked)
    return [table, *beside(asked)] if on_grid else [table]
